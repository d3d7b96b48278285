"""The compiled innermost loop of the sweep; :func:`lissom.core.columns.decide_columns` is its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.columns import ColumnLoop, Strip, decide_columns
from ..core.grid import GridParams
from .native import extension

_MOST = 64  # columns that the kernel holds at once


def column_loop() -> ColumnLoop:
    """The fastest loop of this installation: the compiled one, or torch where there is none."""
    return decide_columns if extension is None else compiled


def compiled(strip: Strip, params: GridParams | None, begin: int, end: int, reach: int, isa: str = "") -> None:
    """The same as :func:`.decide_columns`, for float32 on the processor; other tensors go there. Masks and codes agree up to
    rounding: products are not fused and sums go in the same order, but torch may fuse them.

    One thread does it: the loop is a twentieth of a sweep, and threads beside torch's own, which wait spinning, cost more than
    they bring.
    """
    w = strip.w
    if extension is None or w.dtype != torch.float32 or w.device.type != "cpu" or reach - begin > _MOST:
        return decide_columns(strip, params, begin, end, reach)
    keep = None if strip.keep is None else _array(strip.keep.view(torch.uint8))
    grid = (
        (None, None, None) if params is None else tuple(_array(t) for t in (params.scale, params.zero, params.levels))
    )
    codes = None if strip.codes is None else _array(strip.codes)
    extension.decide_columns(
        _array(w), _array(strip.u), keep, *grid, _array(strip.q), _array(strip.errors), codes,
        begin, end, reach, isa,
    )  # fmt: skip


def _array(t: Tensor):
    return t.contiguous().numpy()
