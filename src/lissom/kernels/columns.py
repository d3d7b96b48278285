"""The compiled innermost loops of the sweeps; those of :mod:`lissom.core.columns` and :mod:`lissom.core.two_sided` are their definition."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ..core import HOST
from ..core.columns import ColumnLoop, Strip, decide_columns
from ..core.grid import GridParams
from ..core.two_sided import Entries, EntryLoop, decide_entries
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


def entry_loop() -> EntryLoop:
    """The fastest loop over entries of this installation."""
    return decide_entries if extension is None else compiled_entries


def compiled_entries(block: Entries, isa: str = "") -> None:
    """The same as :func:`.decide_entries` up to the order of sums, for float32; other types go there. It runs on the processor,
    wherever the tensors are: every entry waits for the one before it.
    """
    if extension is None or block.w.dtype != torch.float32:
        return decide_entries(block)
    here = [_array(t.to(HOST)) for t in (block.w, block.left, block.u, block.v)]
    keep = None if block.keep is None else _array(block.keep.to(HOST).view(torch.uint8))
    grid = [_array(t.to(HOST)) for t in (block.params.scale, block.params.zero, block.params.levels)]
    codes, errors = torch.empty_like(block.codes, device=HOST), torch.empty_like(block.errors, device=HOST)
    extension.decide_entries(*here, keep, *grid, _array(codes), _array(errors), isa)
    block.codes.copy_(codes)
    block.errors.copy_(errors)


def _array(t: Tensor):
    return t.contiguous().numpy()
