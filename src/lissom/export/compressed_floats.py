"""Floating-point grids of compressed-tensors, from lissom's codebooks: FP8 (E4M3), NVFP4 and MXFP4.

    float-quantized        weight float8_e4m3fn (out, in);  weight_scale (out, groups)
    nvfp4-pack-quantized   weight_packed uint8 (out, in / 2);  weight_scale float8_e4m3fn (out, in / 16);  weight_global_scale (1,)
    mxfp4-pack-quantized   weight_packed uint8 (out, in / 2);  weight_scale uint8 (out, in / 32), exponent + 127

FP4 is a sign and one of 0, ½, 1, 1½, 2, 3, 4, 6 in four bits, the earlier input in the lower half of a byte. Scales of NVFP4 are
*divided* by the global scale, which is 1 / lissom's: the weights may move by the last bit of fp32, and what goes on through a
run is what the file gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import FormatError, Levels
from ..methods.quantize.codebook import table_of
from .layout import need, shape_of

FORMATS = {
    "e4m3": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}  # codebook → format
TABLES = {form: table for table, form in FORMATS.items()}
BITS = {"e4m3": 8, "nvfp4": 4, "mxfp4": 4}
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def encode_levels(form: Levels) -> dict[str, Tensor]:
    """The tensors of a layer; ``form.name`` is a key of :data:`FORMATS`."""
    levels = form.table[0][form.values.long()]
    if form.name == "e4m3":
        return {"weight": levels.to(torch.float8_e4m3fn), "weight_scale": form.scale.half().contiguous()}
    nibbles = (torch.searchsorted(_MAGNITUDES, levels.abs()) + 8 * (levels < 0)).to(torch.uint8)
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous()
    if form.name == "mxfp4":
        exponent = torch.log2(form.scale).round().to(torch.int32) + 127
        return {"weight_packed": packed, "weight_scale": exponent.to(torch.uint8).contiguous()}
    block = (form.scale / form.tensor_scale).to(torch.float8_e4m3fn).contiguous()
    return {
        "weight_packed": packed, "weight_scale": block, "weight_global_scale": torch.tensor([1.0 / form.tensor_scale]),
    }  # fmt: skip


def decode_levels(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Levels:
    """Inverse of :func:`encode_levels`; raises :class:`FormatError` for shapes that do not fit."""
    name = TABLES[entry["format"]]
    rows, columns = shape_of(entry)
    size = int(entry.get("group_size") or columns)
    more = ["weight_global_scale"] if name == "nvfp4" else []
    first, scale, *rest = need(tensors, "weight" if name == "e4m3" else "weight_packed", "weight_scale", *more)
    table = table_of(name, BITS[name])
    if name == "e4m3":
        values = torch.bucketize(first.float(), (table[1:] + table[:-1]) / 2)
    else:
        nibbles = torch.stack([first & 15, first >> 4], 2).reshape(rows, -1).long()
        signed = torch.cat([_MAGNITUDES, -_MAGNITUDES])[nibbles]
        values = torch.bucketize(signed, (table[1:] + table[:-1]) / 2)
    groups = -(-columns // size)
    if tuple(values.shape) != (rows, columns) or scale.numel() not in (1, rows * groups):
        raise FormatError(f"{tuple(first.shape)} weights and {tuple(scale.shape)} scales do not fit {rows} × {columns}")
    wide = scale.expand(rows, groups) if scale.numel() == 1 else scale.reshape(rows, groups)
    tensor_scale = 1.0
    if name == "mxfp4":
        wide = torch.exp2(wide.float() - 127)
    elif name == "nvfp4":
        wide = wide.float() / rest[0].float()
        tensor_scale = float(1.0 / rest[0])
    wide = wide.float().contiguous()
    if not bool(torch.isfinite(wide).all()):
        raise FormatError("the scales are not all finite")
    kind = {"e4m3": "float16", "nvfp4": "e4m3", "mxfp4": "e8m0"}[name]
    return Levels(values.to(torch.uint8), table[None], wide, size, name, kind, tensor_scale)


def misfits(table: str, columns: int, size: int | None) -> str | None:
    """Why groups of ``size`` do not fit, or None."""
    if table not in FORMATS:
        return f"compressed-tensors has no form {table}; use format packed, or dense"
    size = {"nvfp4": 16, "mxfp4": 32}.get(table, size or columns)
    return (
        f"{FORMATS[table]} needs groups that divide the {columns} inputs, {size} does not" if columns % size else None
    )


def weight_args(format: str, size: int) -> dict[str, Any]:
    """``weights`` of a config group; ``size`` −1: one scale for each output."""
    table = TABLES[format]
    strategy = "tensor_group" if table == "nvfp4" else "channel" if size == -1 else "group"
    scales = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}.get(table)
    return {
        "num_bits": BITS[table], "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy,
        "group_size": None if size == -1 else size, **({"scale_dtype": scales, "zp_dtype": scales} if scales else {}),
    }  # fmt: skip
