"""The GPTQ format of AutoGPTQ, GPTQModel, vLLM and transformers: four tensors a layer, packed along the inputs.

    qweight  int32 (in · bits / 32, out)       codes, ``bits`` each, from the lowest bit of the first word
    qzeros   int32 (groups, out · bits / 32)   zero points, packed along the outputs; version 1 stores zero − 1
    scales   fp16  (groups, out)
    g_idx    int32 (in,)                       the group of each input
    weight[o, i] = (code − zero[g_idx[i], o]) · scale[g_idx[i], o]

Version 1 cannot hold a zero point of 0 (it would be −1, which readers take for 15, 16 or a carry into the neighbour), so
asymmetric grids need version 2, which stores zero points as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Codes, FormatError, Solved
from .bits import pack_bits, unpack_bits
from .layout import LayerPlan, Layout, StoredLayer, check_codes, describe, need, shape_of

METHOD = "gptq"
LOCAL_NAMES = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)
_WORD = 32


class GPTQ:
    """``version`` 1 (every reader) or 2 (zero points of 0 too; GPTQModel and what is built on it)."""

    reader = "gptqmodel"

    def __init__(self, version: int = 1):
        self.version = version
        self.name = METHOD if version == 1 else "gptq-v2"

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        codes = solved.codes
        if codes is None:
            raise FormatError("the GPTQ format holds layers with codes of a uniform grid only")
        check_codes(codes)
        rows, columns = codes.values.shape
        plan = LayerPlan(
            "layer", (rows, columns), layout.pattern, codes.bits, codes.group_size, codes.symmetric, layout.transposed
        )
        if problems := self.check(plan):
            raise FormatError("; ".join(problems))
        zero = codes.zero.to(torch.int64) - (1 if self.version == 1 else 0)
        return {
            "qweight": _words(codes.values, codes.bits).T.contiguous(),
            "qzeros": _words(zero.T.contiguous(), codes.bits).contiguous(),
            "scales": codes.scale.half().T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // codes.group_size,
        }

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        return describe(solved, layout) | {"version": self.version}

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        rows, columns = shape_of(entry)
        bits, size = int(entry["bits"]), int(entry["group_size"])
        qweight, qzeros, scales, g_idx = need(tensors, *LOCAL_NAMES)
        groups = -(-columns // size)
        for name, tensor, shape in (
            ("qweight", qweight, (columns * bits // _WORD, rows)), ("qzeros", qzeros, (groups, rows * bits // _WORD)),
            ("scales", scales, (groups, rows)), ("g_idx", g_idx, (columns,)),
        ):  # fmt: skip
            if tuple(tensor.shape) != shape:
                raise FormatError(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        if not bool(torch.isfinite(scales).all()):
            raise FormatError("the scales are not all finite")
        values = _codes(qweight.T, bits, columns)
        zero = _codes(qzeros, bits, rows).T.to(torch.int64)
        zero = (zero + 1) % 2**bits if entry["version"] == 1 else zero
        codes = Codes(values, scales.T.float().contiguous(), zero.float().contiguous(), bits, size)
        if not torch.equal(
            g_idx.long(), torch.arange(columns) // size
        ):  # desc_act: groups of inputs that are not neighbours
            at = g_idx.long()
            if int(at.min()) < 0 or int(at.max()) >= groups:
                raise FormatError(f"g_idx must be 0 … {groups - 1}")
            return StoredLayer(None, None, "dense", (values.float() - codes.zero[:, at]) * codes.scale[:, at])
        pattern = str(entry.get("pattern", "dense"))
        layer = StoredLayer(codes, None, pattern)
        return layer if pattern == "dense" else StoredLayer(codes, layer.weight != 0, pattern)

    def check(self, layer: LayerPlan) -> list[str]:
        name, (rows, columns) = layer.name, layer.shape
        if layer.form is not None:
            return [f"{name}: the GPTQ format holds uniform grids, not {layer.form}; use format packed, or dense"]
        if layer.bits is None:
            return [
                f"{name}: readers of the GPTQ format expect every linear layer quantized, and this one has no bits; quantize it, "
                "or use format compressed-tensors"
            ]
        out = []
        if layer.bits not in _BITS:
            out.append(f"{name}: the GPTQ format holds 2, 3, 4 or 8 bits, not {layer.bits}")
        elif rows * layer.bits % _WORD or columns * layer.bits % _WORD:
            out.append(f"{name}: {rows} × {columns} codes of {layer.bits} bits do not fill whole 32-bit words")
        size = layer.group_size
        if size is not None and size < columns and columns % size:
            out.append(
                f"{name}: readers of the GPTQ format need groups that divide the {columns} inputs, {size} does not; choose "
                "another group_size, or 0 (one scale for each output)"
            )
        if self.version == 1 and not layer.symmetric:
            out.append(
                f"{name}: version 1 of the GPTQ format has no zero point 0; set symmetric: true, or format gptq-v2"
            )
        if layer.transposed:
            out.append(
                f"{name}: lissom writes nn.Linear only in the GPTQ format, not GPT-2's Conv1D; use format packed"
            )
        if layer.kind != "linear":
            out.append(f"{name}: the GPTQ format keeps embeddings dense; use format packed")
        return out

    def advice(self, layer: LayerPlan) -> list[str]:
        if layer.pattern == "dense":
            return []
        return [f"{layer.name}: the GPTQ format stores zeros as codes; sparsity saves no bytes (format packed does)"]

    def config(self, entries: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any] | None:
        """The commonest scheme for all layers, and GPTQModel's ``dynamic`` rules for layers that differ."""
        schemes = {name: _scheme(e) for name, e in entries.items()}
        common = dict(Counter(tuple(s.items()) for s in schemes.values()).most_common(1)[0][0])
        dynamic = {f"+:^{re.escape(name)}$": s for name, s in sorted(schemes.items()) if s != common}
        return {
            "quant_method": METHOD,
            **common,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


def entry_from_config(
    config: Mapping[str, Any], name: str, qweight: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """The entry of layer ``name`` of a directory by any tool, whose ``qweight`` has this shape and dtype.

    Raises :class:`FormatError` for what lissom does not read.
    """
    settings = dict(config)
    for rule, override in (config.get("dynamic") or {}).items():
        if rule.startswith("+:") and re.match(rule[2:], name):
            settings |= override
    bits, form = settings.get("bits"), config.get("checkpoint_format", METHOD)
    if bits not in _BITS or form not in (METHOD, "gptq_v2") or dtype != torch.int32 or len(qweight) != 2:
        raise FormatError(
            f"{name}: {form} with {bits} bits in {dtype} words is not read; gptq and gptq_v2 in int32 are"
        )
    columns = qweight[0] * _WORD // bits
    size = settings.get("group_size", -1)
    return {
        "shape": [qweight[1], columns], "pattern": "dense", "bits": bits,
        "group_size": columns if size in (-1, None) else size, "symmetric": bool(settings.get("sym", True)),
        "version": 1 if form == METHOD else 2,
    }  # fmt: skip


def _scheme(entry: Mapping[str, Any]) -> dict[str, Any]:
    whole = entry["group_size"] >= entry["shape"][1]
    return {"bits": entry["bits"], "group_size": -1 if whole else entry["group_size"], "sym": entry["symmetric"]}


def _words(values: Tensor, bits: int) -> Tensor:
    """Rows of codes as int32 words, (rows, columns · bits / 32); a row fills whole words."""
    flat = pack_bits(values.numpy(), bits)
    return torch.from_numpy(flat.view("<i4").reshape(values.shape[0], -1).copy())


def _codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`_words`, uint8."""
    rows = words.shape[0]
    raw = np.ascontiguousarray(words.contiguous().numpy().astype("<i4")).view(np.uint8).reshape(-1)
    return torch.from_numpy(unpack_bits(raw, bits, rows * columns).reshape(rows, columns))
