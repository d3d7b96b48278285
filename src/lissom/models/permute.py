"""Channels whose order is free: what makes them and what reads them, permuted together, gives the same function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Units
from .architectures import Architecture
from .forward import Linear
from .layout import Sizes
from .units import units_of


def free_channels(row: Architecture, config: Any, linears: Sequence[Linear]) -> list[tuple[Units, int]]:
    """(channels, segments) of one block: the MLP's neurons, in one segment, and the value channels, in a segment for each KV head.

    A value channel is read by one column of ``o`` for every query head of its group, so those move together.
    """
    s = Sizes.of(row, config)
    by_role = {layer.role: layer.name for layer in linears}
    d, per = s.head_dim, s.heads // s.kv_heads
    group, channel = torch.arange(s.kv_heads)[:, None, None], torch.arange(d)[None, :, None]
    columns = ((group * per + torch.arange(per)) * d + channel).reshape(s.kv_heads * d, per)
    rows = torch.arange(s.kv_heads * d)
    if "qkv" in by_role:
        rows = rows + s.heads * d + s.kv_heads * d if row.qkv == "split" else rows // d * 3 * d + 2 * d + rows % d
    name = by_role.get("v") or by_role["qkv"]
    width = {layer.name: layer.columns for layer in linears}[name]
    values = Units("values", {name: rows[:, None]}, {by_role["o"]: columns}, width + per * s.width)
    return [(units_of(row, config, linears, "neurons"), 1), (values, s.kv_heads)]


def permuted(parameters: Mapping[str, Tensor], units: Units, order: Tensor) -> dict[str, Tensor]:
    """Tensors of a block, weights (out, in), with channel ``order[j]`` at place j on both sides."""
    out = dict(parameters)
    for name, index in units.rows.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in out:
                out[key] = out[key].index_copy(0, index.flatten(), out[key][index[order].flatten()])
    for name, index in units.columns.items():
        key = f"{name}.weight"
        out[key] = out[key].index_copy(1, index.flatten(), out[key][:, index[order].flatten()])
    return out
