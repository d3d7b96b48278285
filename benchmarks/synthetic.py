"""Models of random weights in the shape of real ones: the speed of an engine does not depend on what weights say.

:func:`parts` packs one block and copies its bytes for the others, :func:`write_gguf` writes the same shape as llama.cpp's own
Q4_0 files have it (Q6_K for a tied embedding whose width divides by 256, otherwise Q8_0). Both take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lissom.kernels.native import extension
from lissom.run.parts import ROLES, VECTORS, BlockParts, Layers, Parts, gather

SHAPES: dict[str, dict[str, int]] = {
    "demo-shape": {"layers": 30, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
    "0.6B": {"layers": 11, "width": 2048, "inner": 5632, "heads": 32, "kv_heads": 8, "vocabulary": 49152},
    "1.7B": {"layers": 24, "width": 2048, "inner": 8192, "heads": 32, "kv_heads": 32, "vocabulary": 49152},
}
HEAD_DIM = 64
_KINDS = {"int2": 2, "int3": 3, "int4": 4, "int6": 6, "int8": 8}


def linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a block."""
    width, q, kv = shape["width"], shape["heads"] * HEAD_DIM, shape["kv_heads"] * HEAD_DIM
    return {
        "q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q), "gate": (shape["inner"], width),
        "up": (shape["inner"], width), "down": (width, shape["inner"]),
    }  # fmt: skip


def _pack(rows: int, columns: int, form: str, draw: np.random.Generator) -> Any:
    """A packed matrix of random codes: "int4", "4:16 int4", … in groups of 64; "4:16 by row int4": rows keep 1 to 7, four on average."""
    pattern, _, kind = form.rpartition(" ")
    bits = _KINDS[kind]
    middle = 2 ** (bits - 1)
    values = draw.integers(1, 2 * middle, (rows, columns), dtype=np.uint8)
    scale = np.full((rows, columns // 64), columns**-0.5 / middle, np.float32)
    zero = np.full_like(scale, middle)
    slots, mask = 0, None
    if pattern:
        kept = slots = int(pattern.split(":")[0])
        if pattern.endswith("by row"):
            kept, slots = 1 + draw.binomial(2 * (slots - 1), 0.5, (rows, 1)), 0  # slots: what each strip needs
        order = draw.permuted(np.tile(np.arange(16, dtype=np.uint8), (rows * columns // 16, 1)), axis=1)
        mask = (order.reshape(rows, columns) < kept).astype(np.uint8)
    number = {4: 104, 8: 108}[bits] if pattern else bits
    assert extension is not None
    return extension.Matrix.pack(number, values, scale, zero, mask, 64, 64, slots, False)


def _copy(matrix: Any) -> Any:
    assert extension is not None
    return extension.Matrix.borrow(*matrix.parts, np.array(matrix.data))


def parts(shape: dict[str, int], form: str, outer: str = "int8") -> Parts:
    """A llama with a tied head. ``form`` of the linear layers, ``outer`` of the embedding."""
    draw = np.random.default_rng(0)
    width = shape["width"]
    first = {role: _pack(*linear_shapes(shape)[role], form, draw) for role in ROLES}
    vectors: dict[str, list[float]] = {name: [] for name in VECTORS}
    vectors["norm1"] = vectors["norm2"] = [1.0] * width
    blocks = [
        BlockParts({r: m if i == 0 else _copy(m) for r, m in first.items()}, vectors) for i in range(shape["layers"])
    ]
    head = _pack(shape["vocabulary"], width, outer, draw)
    frequency = [10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    sizes = {k: v for k, v in shape.items()} | {
        "head_dim": HEAD_DIM, "rotary": HEAD_DIM, "rotary_scale": 1.0, "epsilon": 1e-5,
        "attention_scale": HEAD_DIM**-0.5, "window": 0,
    }  # fmt: skip
    size = sum(m.bytes for m in first.values()) * shape["layers"] + head.bytes
    made = Parts(
        "synthetic", sizes, 8192, blocks, head, head, [1.0] * width, frequency, frozenset, lambda: None,
        Layers({}, size, []),
    )  # fmt: skip
    gather(made)
    return made


def write_gguf(shape: dict[str, int], path: Path) -> Path:
    """The same shape for llama.cpp, blocks of random codes."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(shape["width"])
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(2)  # mostly Q4_0

    def half(value: float) -> np.ndarray:
        return np.frombuffer(np.float16(value).tobytes(), np.uint8)

    def put(name: str, rows: int, columns: int, kind: Any) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = draw.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
        middle = {gguf.GGMLQuantizationType.Q4_0: 8, gguf.GGMLQuantizationType.Q8_0: 128}.get(kind, 32 * 64)
        scale = half(columns**-0.5 / middle)
        if kind == gguf.GGMLQuantizationType.Q6_K:
            data[:, -2:] = scale
        else:
            data[:, :2] = scale
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=kind)

    q4 = gguf.GGMLQuantizationType.Q4_0
    names = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    width = shape["width"]
    outer = gguf.GGMLQuantizationType.Q6_K if width % 256 == 0 else gguf.GGMLQuantizationType.Q8_0
    put("token_embd.weight", shape["vocabulary"], width, outer)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for i in range(shape["layers"]):
        for role, (rows, columns) in linear_shapes(shape).items():
            put(f"blk.{i}.{names[role]}.weight", rows, columns, q4)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
