"""compressed-tensors directories: ``pack-quantized`` (2 … 8 bits in int32 words) and ``int-quantized`` (int8).

The library decodes ``(code − 2^(b−1) − zero_point) · scale`` in the dtype of the loaded scale, with signed codes and
``zero_point = zero − 2^(b−1)``: the same weights as :meth:`lissom.core.Codes.decode`, bit for bit when the model is
loaded in float32 (every product fits), rounded once in float16. In bfloat16 transformers rounds the scale *before*
multiplying, so artefacts for that dtype should be loaded in float16 or float32.

Zero points: transformers 5.23 with compressed-tensors 0.20 cannot load packed ones (the library forgets to pack them
when it prepares a model without weights, and the shapes differ), so an asymmetric layer of b bits is stored as a
symmetric one of b + 1 bits – ``code − zero`` is an integer in ±(2^b − 1) – with the same weights; of 8 bits, as int8
with plain zero points. ``zero_points=True`` writes the standard form (vLLM reads it) instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import Codes, FormatError, Levels, Solved
from ..core.grid import spread_groups
from ..methods.quantize.kv_cache import CacheGrid
from ..models import Architecture
from ..models.layout import stages
from .compressed_floats import BITS, TABLES, decode_levels, encode_levels, misfits, weight_args
from .compressed_floats import FORMATS as FLOATS
from .dense import Dense
from .layout import LayerPlan, Layout, StoredLayer, check_codes, describe, need

Format = Literal["pack-quantized", "int-quantized"]
METHOD = "compressed-tensors"
RUN_NAMES = ("input_scale", "input_zero_point")  # read by engines, not needed to decode
LOCAL_NAMES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight",
    "weight_global_scale",
)


class CompressedTensors:
    """``format``: "pack-quantized" (tight, any bits 2 … 8) or "int-quantized" (one int8 a weight, 8 bits).

    ``zero_points``: pack the zero points of asymmetric layers instead of storing a bit more. ``cache``: the grid of
    ``kv_cache_scheme``, per token with an integer zero point. Layers of 8 bits whose inputs are rounded too are stored as
    int8 whatever ``format`` says: engines have kernels for that form.
    """

    reader = "compressed_tensors"

    def __init__(self, format: Format = "pack-quantized", zero_points: bool = False, cache: CacheGrid | None = None):
        self.cache = cache
        self.format: Format = format
        self.zero_points = zero_points
        self.name = METHOD if format == "pack-quantized" else format

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        if (form := _levels(solved)) is not None:
            return encode_levels(form)
        if solved.codes is None:
            return Dense().encode(solved, layout)
        check_codes(solved.codes)
        if problems := self.check(_plan_of(solved.codes, layout)):
            raise FormatError("; ".join(problems))
        codes, form = self._stored(solved.codes, layout)
        half = 2 ** (codes.bits - 1)
        signed = (codes.values.to(torch.int16) - half).to(torch.int8)
        zero = (codes.zero - half).to(torch.int8)
        out = {"weight_scale": codes.scale.half().contiguous()}
        if form == "int-quantized":
            out["weight"] = signed.contiguous()
            return out if codes.symmetric else out | {"weight_zero_point": zero.contiguous()}
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        out["weight_packed"] = pack_to_int32(signed, codes.bits)
        out["weight_shape"] = torch.tensor(signed.shape, dtype=torch.int64)
        if not codes.symmetric:
            out["weight_zero_point"] = pack_to_int32(zero, codes.bits, packed_dim=0).contiguous()
        return out

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        out = describe(solved, layout) | {"format": "dense"}
        inputs = {"input_bits": layout.input_bits, "input_static": layout.input_static}
        if (form := _levels(solved)) is not None:
            del out["dtype"]
            size = min(form.group_size, form.values.shape[1])
            return (
                out
                | {"bits": BITS[form.name], "group_size": size, "symmetric": True, "format": FLOATS[form.name]}
                | (inputs if layout.input_bits is not None else {})
            )
        if solved.codes is None:
            return out
        codes, form = self._stored(solved.codes, layout)
        if layout.input_bits is not None:
            out |= inputs
        return out | {"bits": codes.bits, "symmetric": codes.symmetric, "format": form}

    def _stored(self, codes: Codes, layout: Layout) -> tuple[Codes, Format]:
        """The same weights in a form that loads, and its format."""
        if layout.input_bits is not None and codes.bits == 8:
            return codes, "int-quantized"
        if codes.symmetric or self.zero_points or self.format == "int-quantized":
            return codes, self.format
        if codes.bits == 8:
            return codes, "int-quantized"
        middle = 2**codes.bits
        zero = spread_groups(codes.zero, codes.values.shape[1], codes.group_size).to(torch.int16)
        values = (codes.values.to(torch.int16) - zero + middle).to(torch.uint8)
        return replace(codes, values=values, zero=torch.full_like(codes.zero, middle), bits=codes.bits + 1), self.format

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        if entry.get("bits") is None:
            return Dense().decode(tensors, entry)
        pattern = str(entry.get("pattern", "dense"))
        if entry.get("format") in TABLES:
            form = decode_levels(tensors, entry)
            weight = form.decode()
            return StoredLayer(None, None if pattern == "dense" else weight != 0, pattern, weight, form)
        codes = _read_int8(tensors, entry) if entry.get("format") == "int-quantized" else _read_packed(tensors, entry)
        layer = StoredLayer(codes, None, pattern)
        return layer if pattern == "dense" else StoredLayer(codes, layer.weight != 0, pattern)

    def check(self, layer: LayerPlan) -> list[str]:
        if layer.form is not None:
            why = misfits(layer.form, layer.shape[1], layer.group_size)
            if layer.transposed and not why:
                why = "compressed-tensors knows nn.Linear only, not GPT-2's Conv1D; use format packed"
            return [f"{layer.name}: {why}"] if why else []
        if layer.bits is None:
            return []
        out = []
        lowest = 8 if self.format == "int-quantized" else 2
        if not lowest <= layer.bits <= 8:
            allowed = "8" if lowest == 8 else "2 … 8"
            out.append(f"{layer.name}: {self.format} holds {allowed} bits, not {layer.bits}")
        columns, size = layer.shape[1], layer.group_size
        if size is not None and size < columns and columns % size:
            fits = [s for s in range(16, columns + 1) if columns % s == 0 and s % 16 == 0]
            near = sorted(sorted(fits, key=lambda s: abs(s - size))[:3])
            hint = f"choose {', '.join(map(str, near))} or " if near else "choose "
            out.append(
                f"{layer.name}: compressed-tensors needs groups that divide the {columns} inputs, {size} does not; "
                f"{hint}group_size 0 (one scale for each output), or format packed"
            )
        if layer.transposed:
            out.append(f"{layer.name}: compressed-tensors knows nn.Linear only, not GPT-2's Conv1D; use format packed")
        if layer.kind != "linear":
            out.append(f"{layer.name}: lissom keeps embeddings dense in compressed-tensors; use format packed")
        return out

    def advice(self, layer: LayerPlan) -> list[str]:
        out = []
        if layer.pattern != "dense":
            out.append(
                f"{layer.name}: compressed-tensors stores zeros as codes; sparsity saves no bytes (format packed does)"
            )
        if layer.form is not None:
            return out
        if layer.bits is not None and not layer.symmetric and self.format == "pack-quantized" and not self.zero_points:
            stored = "int8 with zero points" if layer.bits == 8 else f"{layer.bits + 1} bits, symmetric"
            out.append(
                f"{layer.name}: transformers cannot load packed zero points; the asymmetric {layer.bits}-bit layer is "
                f"stored, with the same weights, as {stored}. Set symmetric: true for {layer.bits} bits"
            )
        elif layer.bits is not None and layer.bits not in (4, 8):
            out.append(f"{layer.name}: {layer.bits} bits load in transformers; vLLM has kernels for 4 and 8 only")
        return out

    def config(self, entries: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any] | None:
        """One group for each combination of bits, group size, symmetry and format, with the layers' names as targets."""
        from compressed_tensors.quantization import QuantizationConfig

        schemes: dict[tuple[int, int, bool, str, int, bool], list[str]] = {}
        for name, e in entries.items():
            if e["bits"] is not None:
                blocks = TABLES.get(e["format"], "e4m3") != "e4m3"  # FP4 has blocks of one size, however short the row
                group = -1 if e["group_size"] >= e["shape"][1] and not blocks else e["group_size"]
                inputs = (e.get("input_bits") or 0, bool(e.get("input_static")))
                schemes.setdefault((e["bits"], group, e["symmetric"], e["format"], *inputs), []).append(name)
        if not schemes and self.cache is None:
            return None
        formats = {key[3] for key in schemes}
        groups = {}
        for number, ((bits, size, symmetric, form, inputs, static), targets) in enumerate(sorted(schemes.items())):
            weights = weight_args(form, size) if form in TABLES else {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size,
            }  # fmt: skip
            groups[f"group_{number}"] = {"targets": sorted(targets), "weights": weights, "format": form}
            if inputs:
                groups[f"group_{number}"]["input_activations"] = {
                    "num_bits": inputs, "type": "int", "symmetric": True, "dynamic": not static,
                    "strategy": "tensor" if static else "token",
                }  # fmt: skip
        ignore = sorted(name for name, e in entries.items() if e["bits"] is None)
        if "lm_head" not in entries:
            ignore.append("lm_head")
        made = QuantizationConfig.model_validate(
            {
                "config_groups": groups,
                "quant_method": METHOD,
                "kv_cache_scheme": None
                if self.cache is None
                else {
                    "num_bits": self.cache.bits,
                    "type": "int",
                    "symmetric": False,
                    "dynamic": True,
                    "strategy": "group",
                    "group_size": self.cache.group,
                },
                "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
                "quantization_status": "compressed",
                "ignore": ignore,
            }
        )
        return made.model_dump(mode="json")


def entry_from_config(config: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of layer ``name`` of a directory by any tool; ``tensors``: local name → header entry with ``shape``.

    Raises :class:`FormatError` for what lissom does not read (floats, activation order, block strategies).
    """
    group = _group_of(config, name)
    weights = (group or {}).get("weights")
    if not group or not weights:
        raise FormatError(f"no config group of quantization_config names {name}, which has quantized tensors")
    form = group.get("format") or config.get("format")
    strategy = weights.get("strategy") or "tensor"
    grouped = weights.get("group_size") if strategy in ("group", "tensor_group") else None
    if form in TABLES and weights.get("type") == "float" and strategy != "block":
        return {
            "bits": weights["num_bits"],
            "group_size": grouped,
            "symmetric": True,
            "format": form,
            "pattern": "dense",
        }
    if weights.get("type", "int") != "int" or form not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise FormatError(f"{name}: {form} with {weights.get('type')} weights is not read; integers, FP8 and FP4 are")
    if "weight_g_idx" in tensors or strategy not in ("channel", "group", "tensor"):
        raise FormatError(f"{name}: strategy {strategy} or a group order (g_idx) is not read; channel and group are")
    packed = "weight_packed" in tensors
    return {
        "bits": weights["num_bits"],
        "group_size": grouped,
        "symmetric": weights.get("symmetric", True),
        "format": "pack-quantized" if packed else "int-quantized",
        "pattern": "dense",
    }


def operators_from_config(config: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """``lissom_operators`` of a directory by another tool: dynamic symmetric int activations per token, dynamic int caches.

    Raises :class:`FormatError` for activations and caches that lissom's forward pass would not honour.
    """
    found: dict[str, Any] = {}
    inputs = {
        _scheme(g["input_activations"]) for g in config.get("config_groups", {}).values() if g.get("input_activations")
    }
    bare = any(not g.get("input_activations") for g in config.get("config_groups", {}).values())
    if inputs:
        bits, kind, symmetric, dynamic, strategy = next(iter(inputs))
        if len(inputs) > 1 or bare or (kind, symmetric, dynamic, strategy) != ("int", True, True, "token"):
            raise FormatError(
                f"input_activations {sorted(map(str, inputs))} are not honoured by lissom: it knows one scheme for all layers, "
                "int, symmetric, dynamic, per token. Numbers without them would be of another model"
            )
        found["activations"] = {"bits": bits, "stages": list(range(len(stages(row))))}
    cache = config.get("kv_cache_scheme")
    if cache:
        if _scheme(cache)[1:] != ("int", False, True, "group"):
            raise FormatError(
                f"kv_cache_scheme {cache} is not honoured by lissom: it knows int, asymmetric, dynamic groups of channels"
            )
        grid = {"bits": cache["num_bits"], "per": "token", "group": cache["group_size"], "zero": "integer"}
        found["cache"] = {"keys": grid, "values": grid}
    return found


def _levels(solved: Solved) -> Levels | None:
    """The codebook of a layer that has a form here."""
    form = solved.stored
    return form if solved.codes is None and isinstance(form, Levels) and form.name in FLOATS else None


def _scheme(args: Mapping[str, Any]) -> tuple[int, str, bool, bool, str]:
    return (
        args["num_bits"], args.get("type", "int"), args.get("symmetric", True), bool(args.get("dynamic", False)),
        args.get("strategy") or "tensor",
    )  # fmt: skip


def _group_of(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    by_class = None
    for group in config.get("config_groups", {}).values():
        for target in group.get("targets", ()):
            if target == name or (target.startswith("re:") and re.match(target[3:], name)):
                return group
            if target in ("Linear", "Embedding"):
                by_class = by_class or group
    return by_class


def _read_packed(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Codes:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    bits = int(entry["bits"])
    names = ["weight_packed", "weight_scale", "weight_shape"]
    packed, scale, stated, *zeros = need(tensors, *names, *([] if entry["symmetric"] else ["weight_zero_point"]))
    rows, columns = (int(n) for n in stated)
    words = -(-columns * bits // 32)
    if tuple(packed.shape) != (rows, words):
        raise FormatError(f"weight_packed has shape {tuple(packed.shape)} instead of {(rows, words)} for {bits} bits")
    values = unpack_from_int32(packed, bits, torch.Size((rows, columns)))
    scale = _grouped(scale, rows, columns, entry)
    zero = None
    if zeros:
        if tuple(zeros[0].shape) != (-(-rows * bits // 32), scale.shape[1]):
            raise FormatError(f"weight_zero_point has shape {tuple(zeros[0].shape)}, which does not fit {rows} outputs")
        # turned here: the library's own turning fails where all outputs share one word
        turned = zeros[0].T.clone(memory_format=torch.contiguous_format)
        zero = unpack_from_int32(turned, bits, torch.Size((scale.shape[1], rows))).T
    return _unsigned(values, scale, zero, bits, entry)


def _read_int8(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Codes:
    bits = int(entry["bits"])
    zeros = [] if entry["symmetric"] else ["weight_zero_point"]
    values, scale, *_ = need(tensors, "weight", "weight_scale", *zeros)
    if values.dtype != torch.int8 or values.ndim != 2:
        raise FormatError(f"an int-quantized weight must be an int8 matrix, not {values.dtype} {tuple(values.shape)}")
    scale = _grouped(scale, values.shape[0], values.shape[1], entry)
    return _unsigned(values, scale, tensors[zeros[0]].reshape(scale.shape) if zeros else None, bits, entry)


def _grouped(scale: Tensor, rows: int, columns: int, entry: Mapping[str, Any]) -> Tensor:
    size = entry.get("group_size") or columns
    wanted = (rows, -(-columns // size))
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(wanted)
    if scale.numel() != wanted[0] * wanted[1] or not bool(torch.isfinite(scale).all()):
        raise FormatError(f"weight_scale must be {wanted} and finite; it is {tuple(scale.shape)}")
    return scale.float().reshape(wanted).contiguous()


def _unsigned(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int, entry: Mapping[str, Any]) -> Codes:
    half = 2 ** (bits - 1)
    unsigned = values.to(torch.int16) + half
    if int(unsigned.min()) < 0 or int(unsigned.max()) >= 2 * half:
        raise FormatError(f"codes outside of {bits} bits")
    zeros = torch.full_like(scale, half) if zero is None else zero.float() + half
    return Codes(unsigned.to(torch.uint8), scale, zeros, bits, entry.get("group_size") or values.shape[1])


def _plan_of(codes: Codes, layout: Layout) -> LayerPlan:
    rows, columns = codes.values.shape
    return LayerPlan(
        "layer", (rows, columns), layout.pattern, codes.bits, codes.group_size, transposed=layout.transposed
    )
