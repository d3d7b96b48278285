"""An ONNX file of a whole model: encoders to hidden states and sentence embeddings, decoders to logits, without a cache.

Quantized layers are DequantizeLinear nodes over lissom's own codes (int4 or int8, by row or by block), static activations
QuantizeLinear → DequantizeLinear pairs, so an engine sees the scheme and may compute in integers. The graph follows
:mod:`lissom.models.forward` step by step, from the same architecture table; what it does not know is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..core import CheckpointError, FormatError, OutputError
from ..models import Block, Checkpoint, Model
from ..models.forward import inverse_frequencies
from ..models.layout import Sizes, has_final_norm
from .onnx_graph import OPSET, Graph
from .opened import open_model

_LARGEST = 1_900_000_000  # protobuf ends at 2 GB; beyond, the weights go to a file beside
_LOWEST = float(np.finfo(np.float32).min / 2)
_ROTARY = ("default", "linear", "llama3", "yarn")  # the others change with the length


def export_onnx(
    source: str | Path | Checkpoint, out: str | Path, note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Write ``out`` (.onnx) and return {"opset", "quantized": layers as QDQ, "plain": layers, "notes", "bytes"}.

    Inputs ``input_ids`` and ``attention_mask``, int64 (batch, tokens), padding behind the text. Outputs: ``last_hidden_state``
    and ``sentence_embedding`` (mean over tokens, length 1) of an encoder, ``logits`` of a decoder, fp32. Raises
    :class:`FormatError` for models and operators that it does not know, :class:`OutputError` when ``out`` exists.
    """
    checkpoint, target = open_model(source), Path(out)
    if target.exists():
        raise OutputError(f"{target} exists; choose another file or remove it")
    model = Model(checkpoint)
    if why := unsupported(model):
        raise FormatError(f"{checkpoint.source} cannot be written as ONNX: {why}")
    builder = _Builder(model)
    made = builder.build()
    for line in builder.notes:
        if note:
            note(line)
    temporary = target.with_name(target.name + ".partial")
    size = made.ByteSize() if made.ByteSize() > 0 else _LARGEST
    try:
        onnx = builder.g.onnx
        beside = {"save_as_external_data": True, "location": target.name + ".data"} if size >= _LARGEST else {}
        onnx.save(made, str(temporary), **beside)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target}: {error.strerror or error}; make room and run again") from error
    return {
        "opset": OPSET, "quantized": builder.quantized, "plain": builder.plain, "notes": builder.notes,
        "bytes": target.stat().st_size,
    }  # fmt: skip


def unsupported(model: Model) -> str | None:
    """Why the graph cannot be written, or None."""
    row, config, operators = model.architecture, model.config, model.operators
    strange = [
        name
        for name in ("parallel", "residual_after_norm", "attention_cap", "head_cap", "scale_by_layer", "embed_scale")
        if row.setting(config, name)
    ]
    strange += [n for n in ("norm_attention_out", "norm_mlp_out") if getattr(row, n)]
    present = model.checkpoint.names()
    strange += [m for m in (row.project_in, row.project_out) if m and any(n.endswith(f"{m}.weight") for n in present)]
    if row.position == "alibi" or row.norm == "rms+1" or row.qkv == "heads" or strange:
        return f"its graph is written for encoders and plain decoders only, not for {row.name} ({', '.join(strange) or 'its blocks'})"
    if row.window != "none" and (getattr(config, "sliding_window", None) or 0):
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        if "sliding_attention" in kinds:
            return "a sliding window has no node here"
    form = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if row.position == "rotary" and form not in _ROTARY:
        return f"rotary embeddings of type {form!r} change with the length"
    if any(not flag for flag in getattr(config, "no_rope_layers", None) or ()):
        return "layers without positions between others are not written"
    if operators.turns or operators.turn_heads:
        return "it needs rotations at run time (quarot); compress with online=false"
    if operators.cache:
        return "it rounds its cache, and the graph has none; leave out the step kv-cache"
    return None


class _Builder:
    def __init__(self, model: Model):
        self.model, self.row, self.config = model, model.architecture, model.config
        self.g = Graph()
        self.sizes = Sizes.of(self.row, self.config)
        self.notes: list[str] = []
        self.quantized, self.plain = 0, 0
        self._decoded: list[str] = []

    def build(self) -> Any:
        g, model = self.g, self.model
        helper, proto = g.onnx.helper, g.onnx.TensorProto
        outer = model.load_outer()
        keep = g("Cast", "attention_mask", to=proto.BOOL)
        self.tokens = g("Shape", "input_ids", start=1, end=2)
        positions = g("Range", g.constant(0, np.int64), g("Squeeze", self.tokens), g.constant(1, np.int64))
        self.bias = self._bias(keep, positions)
        self.rotary = self._rotary(positions) if self.row.position == "rotary" else None
        h = self._embed(outer)
        for i in range(model.blocks):
            h = self._block(model.load_block(i), h)
        if self.row.final_norm and has_final_norm(self.row, self.config):
            h = self._norm(h, *self._pair(outer, model.prefix + self.row.final_norm))
        if self._decoded:
            self.notes.append(
                f"{len(self._decoded)} layers have no grid that DequantizeLinear holds and are plain fp32: {self._decoded[0]}, …"
            )
        shape: list[Any] = ["batch", "tokens"]
        inputs = [helper.make_tensor_value_info(n, proto.INT64, shape) for n in ("input_ids", "attention_mask")]
        if model.has_head:
            assert model.head_name is not None
            weight = outer[model.head_name]
            bias = outer.get(model.head_name.removesuffix(".weight") + ".bias")
            g.array("head", weight.T)
            self._add(g("MatMul", h, "head"), "head.bias", bias, out="logits")
            outputs = [helper.make_tensor_value_info("logits", proto.FLOAT, [*shape, len(weight)])]
        else:
            g("Identity", h, out="last_hidden_state")
            self._pool(h)
            outputs = [
                helper.make_tensor_value_info("last_hidden_state", proto.FLOAT, [*shape, model.width]),
                helper.make_tensor_value_info("sentence_embedding", proto.FLOAT, ["batch", model.width]),
            ]
        return g.model(inputs, outputs, {"source": str(model.checkpoint.source)})

    def _bias(self, keep: str, positions: str) -> str:
        """0 where a query may see a key, else very low: (batch, 1, tokens or 1, tokens)."""
        g = self.g
        seen = g("Unsqueeze", keep, g.ints(1, 2))
        if self.row.causal:
            rows = g("Unsqueeze", positions, g.ints(1))
            seen = g("And", seen, g("LessOrEqual", g("Unsqueeze", positions, g.ints(0)), rows))
        return g("Where", seen, g.constant(0.0), g.constant(_LOWEST))

    def _rotary(self, positions: str) -> tuple[str, str]:
        g = self.g
        longest = int(getattr(self.config, "max_position_embeddings", 2048))
        frequencies, scale = inverse_frequencies(self.config, None, self.sizes.head_dim, longest)
        at = g("Unsqueeze", g("Cast", positions, to=g.onnx.TensorProto.FLOAT), g.ints(1))
        angles = g("Mul", at, g.constant(frequencies.float().flatten().numpy()[None]))
        cos, sin = (g("Mul", g(kind, angles), g.constant(scale)) for kind in ("Cos", "Sin"))
        return cos, sin

    def _rotate(self, x: str) -> str:
        """``lissom.models.forward.rotate`` of (batch, heads, tokens, size)."""
        assert self.rotary is not None
        g, (cos, sin) = self.g, self.rotary
        frequencies, _ = inverse_frequencies(self.config, None, self.sizes.head_dim, 1)
        half, size = frequencies.shape[-1], self.sizes.head_dim
        a, b = (g("Slice", x, g.ints(i * half), g.ints((i + 1) * half), g.ints(-1)) for i in (0, 1))
        parts = [
            g("Sub", g("Mul", a, cos), g("Mul", b, sin)),
            g("Add", g("Mul", b, cos), g("Mul", a, sin)),
        ]
        if 2 * half < size:
            parts.append(g("Slice", x, g.ints(2 * half), g.ints(size), g.ints(-1)))
        return g("Concat", *parts, axis=-1)

    def _embed(self, outer: dict[str, Tensor]) -> str:
        g, row, prefix = self.g, self.row, self.model.prefix
        h = g("Gather", g.array("embedding", outer[self.model.embed_name]), "input_ids")
        if row.embed_positions:
            table = outer[f"{prefix}{row.embed_positions}.weight"][row.position_offset :]
            # not Gather over the positions: onnxruntime 1.32 turns that into a Slice with a scalar start, which it then refuses
            h = g("Add", h, g("Slice", g.array("positions", table), g.ints(0), self.tokens, g.ints(0)))
        if row.embed_types:
            h = g("Add", h, g.array("type", outer[f"{prefix}{row.embed_types}.weight"][0]))
        return self._norm(h, *self._pair(outer, prefix + row.embed_norm)) if row.embed_norm else h

    @staticmethod
    def _pair(tensors: dict[str, Tensor], module: str) -> tuple[str, Tensor, Tensor | None]:
        return module, tensors[f"{module}.weight"], tensors.get(f"{module}.bias")

    def _norm(self, x: str, name: str, weight: Tensor, bias: Tensor | None) -> str:
        g, epsilon = self.g, float(getattr(self.config, self.row.eps, 1e-5))
        gain = g.array(f"{name}.gain", weight)
        if self.row.norm == "layer":
            more = [] if bias is None else [g.array(f"{name}.bias", bias)]
            return g("LayerNormalization", x, gain, *more, axis=-1, epsilon=epsilon)
        mean = g("ReduceMean", g("Mul", x, x), g.ints(-1), keepdims=1)
        return g("Mul", g("Div", x, g("Sqrt", g("Add", mean, g.constant(epsilon)))), gain)

    def _linear(self, block: Block, module: str, x: str) -> str:
        g = self.g
        stored = self.model.checkpoint.layer(module)  # type: ignore[attr-defined]
        codes = stored.codes
        if codes is not None and codes.group_size < codes.values.shape[1] and codes.values.shape[1] % codes.group_size:
            codes = None  # blocks of DequantizeLinear divide the inputs
        if codes is not None:
            weight = g.dequantized(module, codes)
            self.quantized += 1
        else:
            weight = g.array(f"{module}.weight", block.weight(module).T)
            self.plain += 1
            if stored.codes is not None or stored.form is not None:
                self._decoded.append(module)
        return self._add(g("MatMul", x, weight), f"{module}.bias", block.bias(module))

    def _add(self, x: str, name: str, bias: Tensor | None, out: str | None = None) -> str:
        if bias is None:
            return self.g("Identity", x, out=out) if out else x
        return self.g("Add", x, self.g.array(name, bias), out=out)

    def _attend(self, block: Block, raw: list[str]) -> str:
        g, s, row = self.g, self.sizes, self.row
        if len(raw) == 1:
            widths = g.ints(*(n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)))
            names = [f"{raw[0]}_{part}" for part in "qkv"]
            g.nodes.append(g.onnx.helper.make_node("Split", [raw[0], widths], names, axis=-1))
            raw = names
        q, k, v = (g.heads(x, n, s.head_dim) for x, n in zip(raw, (s.heads, s.kv_heads, s.kv_heads), strict=True))
        at = block._at
        if row.setting(self.config, "qk_norm"):
            q, k = (
                self._norm(x, *self._pair(block.parameters, at + str(n))) for x, n in ((q, row.norm_q), (k, row.norm_k))
            )
        q, k, v = (g("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, k, v))
        if self.rotary is not None:
            q, k = self._rotate(q), self._rotate(k)
        if s.kv_heads != s.heads:
            which = g.ints(*(h * s.kv_heads // s.heads for h in range(s.heads)))
            k, v = (g("Gather", x, which, axis=1) for x in (k, v))
        scale = (getattr(self.config, row.query_scale) if row.query_scale else s.head_dim) ** -0.5
        scores = g("Mul", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), g.constant(scale))
        p = g("Softmax", g("Add", scores, self.bias), axis=-1)
        together = g("Transpose", g("MatMul", p, v), perm=[0, 2, 1, 3])
        return g("Reshape", together, g.ints(0, 0, s.heads * s.head_dim))

    def _activate(self, x: str) -> str:
        g, name = self.g, getattr(self.config, self.row.activation, self.row.activation)
        if name in ("silu", "swish"):
            return g("Mul", x, g("Sigmoid", x))
        if name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            return g("Gelu", x, approximate="none" if name == "gelu" else "tanh")
        if name == "relu":
            return g("Relu", x)
        raise CheckpointError(f"the activation {name!r} is not written as ONNX")

    def _block(self, block: Block, h: str) -> str:
        """:meth:`lissom.models.Block._steps`."""
        g, row, at = self.g, self.row, block._at
        pre = bool(row.setting(self.config, "pre_norm"))

        def norm(x: str, module: str) -> str:
            return self._norm(x, *self._pair(block.parameters, at + module))

        def incoming(stage: int, x: str) -> str:
            grid = block.operators.operators.activations if block.operators else None
            if grid is None or stage not in grid.stages:
                return x
            assert block.operators is not None
            return g.rounded(x, grid.bits, block.operators.scales.get(stage))

        x = incoming(0, norm(h, row.norm_attention) if pre else h)
        raw = [self._linear(block, at + module, x) for _, module in row.attention]
        h = g("Add", h, self._linear(block, at + row.o, incoming(1, self._attend(block, raw))))
        x = norm(h, row.norm_mlp if pre else row.norm_attention)
        h = h if pre else x
        x = incoming(2, x)
        raw = [self._linear(block, at + module, x) for _, module in row.mlp]
        if row.mlp[0][0] == "gate_up":
            names = [f"{raw[0]}_{part}" for part in ("gate", "up")]
            g.nodes.append(g.onnx.helper.make_node("Split", [raw[0]], names, axis=-1, num_outputs=2))
            raw = names
        inner = self._activate(raw[0])
        inner = g("Mul", inner, raw[1]) if len(raw) == 2 else inner
        h = g("Add", h, self._linear(block, at + row.down, incoming(3, inner)))
        return h if pre else norm(h, row.norm_mlp)

    def _pool(self, h: str) -> None:
        """The mean over the tokens that are no padding, at length 1."""
        g = self.g
        weight = g("Unsqueeze", g("Cast", "attention_mask", to=g.onnx.TensorProto.FLOAT), g.ints(2))
        total = g("ReduceSum", g("Mul", h, weight), g.ints(1), keepdims=0)
        mean = g("Div", total, g("ReduceSum", weight, g.ints(1), keepdims=0))
        g("LpNormalization", mean, axis=-1, p=2, out="sentence_embedding")
