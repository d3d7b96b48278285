"""The innermost loop of the sweep as one kernel for a GPU, in Triton; :func:`lissom.core.columns.decide_columns` is its definition.

torch launches about ten kernels a column there, and a launch takes longer than the column's arithmetic: rows do not depend on
each other, so here each thread takes a row and goes through all columns alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import columns
from ..core.columns import Strip
from ..core.grid import GridParams

_ROWS = 32  # a warp


@triton.jit(do_not_specialize=["rows", "span", "begin", "end", "reach"])
def _decide(
    w, u, keep, scale, zero, levels, q, errors, codes, rows, span, begin, end, reach,
    MASKED: tl.constexpr, GRID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < rows
    if GRID:
        step = tl.load(scale + row, mask=mine, other=1.0)
        middle = tl.load(zero + row, mask=mine, other=0.0)
        top = tl.load(levels + row, mask=mine, other=2.0) - 1
    for j in range(begin, reach):
        value = tl.load(w + j * rows + row, mask=mine, other=0.0)
        for i in range(begin, tl.minimum(j, end)):
            e = tl.load(errors + i * rows + row, mask=mine, other=0.0)
            value -= e * tl.load(u + i * span + j)
        tl.store(w + j * rows + row, value, mask=mine)
        if j < end:
            chosen = value
            if MASKED:
                chosen = tl.where(tl.load(keep + j * rows + row, mask=mine, other=0) != 0, value, 0.0)
            if GRID:
                # there and back by 1.5 · 2²³: to the nearest integer, halves to the even one
                nearest = (tl.div_rn(chosen, step) + 12582912.0) - 12582912.0
                code = tl.maximum(tl.minimum(nearest + middle, top), 0.0)
                tl.store(codes + j * rows + row, code.to(tl.uint8), mask=mine)
                chosen = tl.where(chosen == chosen, (code - middle) * step, chosen)
            tl.store(q + j * rows + row, chosen, mask=mine)
            tl.store(errors + j * rows + row, tl.div_rn(value - chosen, tl.load(u + j * span + j)), mask=mine)
            tl.debug_barrier()  # the errors are read again, perhaps by a neighbour


def decide_columns(strip: Strip, params: GridParams | None, begin: int, end: int, reach: int) -> None:
    """The same as :func:`lissom.core.columns.decide_columns` up to rounding, for float32 on a GPU; other tensors go there."""
    if strip.w.dtype != torch.float32:
        return columns.decide_columns(strip, params, begin, end, reach)
    span, rows = strip.w.shape
    keep = strip.q if strip.keep is None else strip.keep.view(torch.uint8)
    codes = strip.q if strip.codes is None else strip.codes
    grid = [strip.q] * 3 if params is None else [_row(t, rows) for t in (params.scale, params.zero, params.levels)]
    launch: Any = _decide[(triton.cdiv(rows, _ROWS),)]
    with torch.cuda.device_of(strip.w):  # a launch goes to the current one
        launch(
            strip.w, strip.u, keep, *grid, strip.q, strip.errors, codes, rows, span, begin, end, reach,
            MASKED=strip.keep is not None, GRID=params is not None, ROWS=_ROWS, num_warps=1,
        )  # fmt: skip


def _row(t: Tensor, rows: int) -> Tensor:
    return t.expand(rows).contiguous()
