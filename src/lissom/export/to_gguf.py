"""A GGUF file for llama.cpp from any checkpoint of the llama family that :func:`open_model` opens.

Quantized layers keep lissom's own codes (:mod:`.ggml_blocks`); nothing is quantized a second time unless asked for.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Affine, Codes, FormatError, Levels, OutputError, RecipeError
from ..models import Checkpoint
from ..models.operators import KEY, read_operators
from .ggml_blocks import BLOCK, QUANTIZED, blocks_fit, encode_blocks, exact_types, q4_1_error
from .layout import StoredLayer
from .opened import OpenedCheckpoint, open_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # by model_type; the first two rotate neighbours in llama.cpp
TYPES = ("auto", "F16", *QUANTIZED)
_ROTATED = ("llama", "mistral")
_PRE = {  # digits in the splitting expression of the tokenizer → its name in llama.cpp
    r"\p{N}{1,3}|": "llama-bpe",
    r"\p{N}|": "qwen2",
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class _Tensor:
    source: str
    name: str
    type: str
    shape: tuple[int, ...]


def export_gguf(
    source: str | Path | Checkpoint,
    out: str | Path,
    type: str = "auto",
    requantize: bool = False,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write ``out`` (.gguf) and return {"types": tensors by type, "exact": bool, "notes": [...], "bytes": size}.

    ``type``: "auto" takes for each matrix the smallest type that holds it exactly (Q4_0, Q5_0, Q8_0, Q4_1, MXFP4, F16, …);
    a block type is used for all quantized-size matrices of the blocks. Where that is not exact, ``requantize`` allows
    rounding the decoded weights again, which the notes say; without it a :class:`FormatError` lists the layers.
    Embedding and head keep their own codes, or F16. Raises :class:`OutputError` when ``out`` exists or cannot be
    written.
    """
    if type not in TYPES:
        raise RecipeError(f"unknown GGUF type {type!r}; choose one of {', '.join(TYPES)}")
    checkpoint, target = open_model(source), Path(out)
    kind = checkpoint.config.model_type
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"GGUF export knows {', '.join(ARCHITECTURES)}, not {kind!r}; use packed or compressed-tensors"
        )
    if target.exists():
        raise OutputError(f"{target} exists; choose another file or remove it")
    operators = read_operators(getattr(checkpoint.config, KEY, None))
    if operators.turns:
        raise FormatError(
            f"{checkpoint.source} needs a rotation at run time, which llama.cpp does not do; use online=false"
        )
    tokens = _tokenizer(checkpoint)
    notes: list[str] = []
    if operators:
        notes.append(
            "rounded activations and caches are operators of the run; llama.cpp chooses its own (--cache-type-k, …)"
        )
    tensors = _choose(checkpoint, type, requantize, notes)
    for line in notes:
        if note:
            note(line)
    temporary = target.with_name(target.name + ".partial")
    try:
        _write(checkpoint, temporary, tensors, tokens)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target}: {error.strerror or error}; make room and run again") from error
    counts = dict(sorted(Counter(t.type for t in tensors).items()))
    return {"types": counts, "exact": not notes, "notes": notes, "bytes": target.stat().st_size}


def _choose(checkpoint: OpenedCheckpoint, wanted: str, requantize: bool, notes: list[str]) -> list[_Tensor]:
    """The type of every tensor; raises :class:`FormatError` for those that need ``requantize``."""
    from gguf import get_tensor_name_map

    names = get_tensor_name_map(_arch(checkpoint)[0], checkpoint.config.num_hidden_layers)
    out, refused, rounded, coarse, shifted = [], [], [], [], 0.0
    for source in checkpoint.names():
        module, _, ending = source.rpartition(".")
        name = names.get_name(module)
        if source.endswith("rotary_emb.inv_freq"):
            continue
        if name is None:
            raise FormatError(f"{source} has no place in a GGUF file of {checkpoint.config.model_type}")
        shape = checkpoint.shape(source)
        if len(shape) == 1:
            out.append(_Tensor(source, f"{name}.{ending}", "F32", shape))
            continue
        stored = checkpoint.layer(module)
        in_block = name.startswith("blk.")
        exact = exact_types(_held(stored))
        if wanted == "F16" or (not exact and (wanted == "auto" or not in_block)):
            kind = "F16" if wanted == "F16" or not in_block else _float_type(stored.weight)
            if kind == "F16" and not torch.equal(stored.weight.half().float(), stored.weight):
                rounded.append(module)
        elif wanted == "auto" or not in_block:
            kind = exact[0]
        elif wanted in exact:
            kind = wanted
        elif wanted == "Q4_1" and stored.codes is not None and stored.codes.bits <= 4 and _fits(stored.codes):
            kind, shifted = "Q4_1", max(shifted, q4_1_error(stored.codes))
        elif requantize and shape[1] % BLOCK == 0:
            kind = wanted
            coarse.append(module)
        else:
            kind = wanted
            why = f"{', '.join(exact)} would be exact" if exact else "its grid does not match"
            refused.append(
                f"{module} ({why})" if shape[1] % BLOCK == 0 else f"{module} ({shape[1]} inputs, not whole blocks)"
            )
        out.append(_Tensor(source, f"{name}.{ending}", kind, shape))
    if refused:
        shown = "; ".join(refused[:3]) + (f"; … {len(refused) - 3} more" if len(refused) > 3 else "")
        raise FormatError(
            f"{len(refused)} matrices cannot be stored as {wanted} from lissom's codes: {shown}. Use type auto, or allow "
            "rounding the weights again with requantize"
        )
    if rounded:
        notes.append(f"{len(rounded)} matrices were rounded to float16: {_some(rounded)}")
    if shifted:
        notes.append(
            f"Q4_1 rounds the minimum of each block to float16: weights move by up to {shifted:.1e}, zeros included"
        )
    if coarse:
        notes.append(
            f"{len(coarse)} matrices were quantized again, to {wanted} by rounding to nearest: {_some(coarse)}"
        )
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _held(stored: StoredLayer) -> Any:
    """The codes, or whatever form stands for them, None of plain weights."""
    return stored.codes if stored.codes is not None else stored.form


def _fits(codes: Codes) -> bool:
    return blocks_fit(codes.values.shape[1], codes.group_size)


def _float_type(weight: Tensor) -> str:
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if torch.equal(weight.to(dtype).float(), weight):
            return name
    return "F32"


def _data(checkpoint: OpenedCheckpoint, tensor: _Tensor) -> np.ndarray:
    """The bytes of one tensor in llama.cpp's order of rows."""
    from gguf import GGMLQuantizationType, quantize

    order = _row_order(checkpoint.config, tensor.source, tensor.shape[0])
    if tensor.type == "F32" and len(tensor.shape) == 1:
        value = checkpoint.tensor(tensor.source).float()
        return (value if order is None else value[order]).numpy()
    stored = checkpoint.layer(tensor.source.removesuffix(".weight"))
    codes = _held(stored)
    if isinstance(codes, Codes | Affine | Levels) and tensor.type in QUANTIZED:
        close = tensor.type == "Q4_1" and isinstance(codes, Codes) and codes.bits <= 4 and _fits(codes)
        if close or tensor.type in exact_types(codes):
            rows = encode_blocks(codes, tensor.type)
            return rows if order is None else rows[order.numpy()]
    weight = stored.weight if order is None else stored.weight[order]
    if tensor.type in ("F16", "F32"):
        return weight.numpy().astype(np.float16 if tensor.type == "F16" else np.float32)
    return quantize(weight.numpy(), GGMLQuantizationType[tensor.type])


def _row_order(config: Any, name: str, rows: int) -> Tensor | None:
    """Rows of q and k of the llama family: ggml rotates neighbours, transformers halves."""
    q = ".q_proj." in name
    if config.model_type not in _ROTATED or not (q or ".k_proj." in name):
        return None
    heads = config.num_attention_heads if q else config.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def _arch(checkpoint: OpenedCheckpoint) -> tuple[Any, str]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    kind = checkpoint.config.model_type
    arch = MODEL_ARCH.LLAMA if kind in _ROTATED else MODEL_ARCH[kind.upper()]
    return arch, MODEL_ARCH_NAMES[arch]


def _write(checkpoint: OpenedCheckpoint, path: Path, tensors: list[_Tensor], tokens: dict[str, Any]) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(path, _arch(checkpoint)[1])
    for method, value in (*_settings(checkpoint.config), *tokens.items()):
        getattr(writer, f"add_{method}")(value)
    for t in tensors:
        kind = GGMLQuantizationType[t.type]
        if t.type in ("F16", "F32"):
            dtype = np.dtype(np.float16 if t.type == "F16" else np.float32)
            writer.add_tensor_info(t.name, t.shape, dtype, int(np.prod(t.shape)) * dtype.itemsize)
        else:
            shape = quant_shape_to_byte_shape(t.shape, kind)
            writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(np.ascontiguousarray(_data(checkpoint, t)))
    writer.close()


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Model metadata as (writer method, value)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise FormatError(f"GGUF export does not write rotary scaling of type {rope['rope_type']!r}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    yield "type", "model"
    yield "file_type", 1  # mostly F16: the closest that llama.cpp has for a mixture
    yield "quantization_version", 2
    yield "vocab_size", config.vocab_size
    yield "context_length", config.max_position_embeddings
    yield "embedding_length", config.hidden_size
    yield "block_count", config.num_hidden_layers
    yield "feed_forward_length", config.intermediate_size
    yield "head_count", config.num_attention_heads
    yield "head_count_kv", config.num_key_value_heads
    yield "key_length", head
    yield "value_length", head
    yield "rope_dimension_count", head
    yield "rope_freq_base", float(rope.get("rope_theta", 10000.0))
    yield "layer_norm_rms_eps", float(config.rms_norm_eps)


def _tokenizer(checkpoint: OpenedCheckpoint) -> dict[str, Any]:
    """Tokenizer metadata by writer method. Byte-level BPE only; raises :class:`FormatError` for others."""
    tokenizer = checkpoint.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else {}
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise FormatError(
            f"GGUF export writes byte-level BPE tokenizers; this one is {model.get('type') or type(tokenizer).__name__}"
            + (" with byte fallback (SentencePiece)" if model.get("byte_fallback") else "")
        )
    size = checkpoint.config.vocab_size
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    special = {t["id"]: _CONTROL if t["special"] else _USER for t in data.get("added_tokens", [])}
    out: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": _pre(data.get("pre_tokenizer") or {}),
        "token_list": [by_id.get(i, f"[PAD{i}]") for i in range(size)],
        "token_types": [special.get(i, _NORMAL) if i in by_id else _UNUSED for i in range(size)],
        "token_merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "add_bos_token": _adds_bos(tokenizer),
    }
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            out[f"{name}_token_id"] = token
    if tokenizer.chat_template:
        out["chat_template"] = tokenizer.chat_template
    return out


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _pre(pre: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        expression = str(steps[0].get("pattern", {}).get("Regex", ""))
        for part, name in _PRE.items():
            if part in expression:
                return name
    raise FormatError(f"llama.cpp has no known equivalent of the pre-tokenizer {kinds}; GGUF export cannot write it")
