"""The compiled innermost loops of the sweep; :func:`lissom.core.columns.decide_columns` is their definition."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ..core import HOST
from ..core.columns import ColumnLoop, Strip, decide_columns
from ..core.grid import GridParams
from .native import extension

_MOST = 64  # columns that the kernel holds at once


def column_loop(device: torch.device = HOST) -> ColumnLoop:
    """The fastest loop of this installation for tensors on ``device``: a compiled one, or torch where there is none."""
    if device.type == "cuda":
        return _gpu_loop()
    return decide_columns if extension is None else compiled


@cache
def _gpu_loop() -> ColumnLoop:
    """The kernel in Triton, which comes with torch for CUDA, where it can be built and run (it needs a C compiler)."""
    try:
        from .columns_gpu import decide_columns as loop

        one = torch.ones(1, 1, device="cuda")
        loop(Strip(one.clone(), one, one > 0, one.clone(), one.clone(), None), None, 0, 1, 1)
    except Exception as error:  # whatever the compiler raises: torch's loop is as right
        warnings.warn(f"sweeps on the GPU take torch's own loop, which is slower: {error}", stacklevel=2)
        return decide_columns
    return loop


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
