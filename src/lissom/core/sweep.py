"""One error-feedback sweep over columns: GPTQ, SparseGPT and their joint form (methods/01 §3, 02 §13).

Columns are decided from left to right. With ``H⁻¹ = UᵀU``, the error of column j in row r is

    e = (w_rj − q_rj) / U_jj,        W[r, k] ← W[r, k] − e · U_jk   for k > j,        loss = ½ e²,

which is the optimal update of the columns that are still free, under the assumption that all columns
before j are fixed in every row. What ``q`` may be is the constraint's business: zero where the pattern
drops the weight, the nearest level where there is a grid. Work inside a block of columns is done on
transposed copies (a column of W is then contiguous); rank-one updates reach to the end of a narrow block of 32
columns (:mod:`.columns`), matrix products do the rest of the block and the columns after it.

    zero + level choice   select at block starts (unstructured) or every m columns (N:M);
                          grids fitted at each group start on the *current* weights
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .columns import Strip
from .factor import Factor
from .grid import Codes, GridParams
from .place import HOST
from .problem import Problem, Solved

_BLOCK, _NARROW = 128, 32


def block_width(problem: Problem, wanted: int = _BLOCK) -> int:
    """A block width at which N:M groups and quantization groups begin together with blocks."""
    columns = problem.weight.shape[1]
    unit = problem.constraint.width or columns
    group = problem.constraint.group_size
    if group is not None and group < columns:
        unit = math.lcm(unit, group)
    return min(columns, unit * max(1, wanted // unit))


def _narrow(unit: int, group: int, width: int) -> int:
    """Columns between two matrix products inside a block: rank-one updates reach no further.

    Patterns and groups that look ahead must find their columns up to date, so they begin with a narrow block or lie in one.
    """
    narrow = unit * max(1, _NARROW // unit)
    return narrow if group >= width or group % narrow == 0 or narrow % group == 0 else width


def sweep(
    problem: Problem,
    factor: Factor,
    block: int = _BLOCK,
    static_groups: bool = False,
    target: Tensor | None = None,
    importance: Tensor | None = None,
) -> Solved:
    """Solve ``problem`` with error feedback under the factor's column order.

    ``static_groups`` fits every grid on the original weights first; it is forced when the factor has an
    order, so that groups stay contiguous in the stored layout. ``target``: weights to approximate
    instead of the dense ones (out, in). ``importance``: (in,) in stored order, the score is ``importance_j · w²``;
    by default ``1/U_jj²``.
    """
    constraint = problem.constraint
    W = (problem.weight if target is None else target).clone()
    W[:, factor.dead if factor.order is None else _unordered(factor)] = 0
    rows, columns = W.shape
    order, U = factor.order, factor.U
    group = min(constraint.group_size or columns, columns)
    if constraint.sparse and order is not None:
        if constraint.width != 1:
            raise ValueError(
                "N:M patterns and wide units cannot be swept in activation order: groups would not be contiguous"
            )
        constraint = constraint.ordered(order)
    width = block_width(problem, block)
    together = (
        constraint.width if constraint.sparse and constraint.local else 1
    )  # columns that are decided on their own
    if together == 0:
        raise ValueError("layers of one stack cannot be N:M and whole rows at once")
    narrow = _narrow(together, group, width)

    fitted: list[GridParams] = []
    static: GridParams | None = None  # transposed: (groups, rows)
    if constraint.quantized and (static_groups or order is not None or group >= columns):
        fitted = [constraint.fit_all(W)]
        static = GridParams(*(t.T.contiguous() for t in (fitted[0].scale, fitted[0].zero, fitted[0].levels)))
    if order is not None:
        W = W[:, order]
    group_of = (torch.arange(columns) if order is None else order).to(HOST) // group  # its entries are read one by one

    root = 1 / U.diagonal() if importance is None else importance.sqrt()
    if importance is not None and order is not None:
        root = root[order]

    Q = torch.empty_like(W)
    keep_all = torch.empty_like(W, dtype=torch.bool) if constraint.sparse else None
    values = torch.empty(rows, columns, dtype=torch.uint8) if constraint.quantized else None
    loss = torch.zeros(rows, dtype=W.dtype)
    params: GridParams | None = None

    for start in range(0, columns, width):
        stop = min(start + width, columns)
        span = stop - start
        w = W[:, start:stop].T.contiguous()  # (span, rows)
        keep: Tensor | None = None
        if constraint.sparse and together == 1:
            keep = constraint.select((w * root[start:stop, None]).square().T, start).T.contiguous()
        elif constraint.sparse:
            keep = torch.empty_like(w, dtype=torch.bool)
        strip = Strip(
            w, U[start:stop, start:stop].contiguous(), keep, torch.empty_like(w), torch.empty_like(w),
            torch.empty_like(w, dtype=torch.uint8) if values is not None else None,
        )  # fmt: skip
        for begin in range(0, span, narrow):
            end = min(begin + narrow, span)
            i = begin
            while i < end:  # a run of columns at which nothing is chosen or fitted
                column, after = start + i, end
                if keep is not None and together > 1:
                    if i % together == 0:
                        here = slice(i, i + together)
                        score = (w[here] * root[column : column + together, None]).square().T
                        keep[here] = constraint.select(score, column).T
                    after = min(after, i + together - i % together)
                if static is not None:
                    g = int(group_of[column])
                    params = GridParams(static.scale[g], static.zero[g], static.levels[g])
                    after = min(after, i + _same(group_of[column : start + after]))
                elif constraint.quantized:
                    after = min(after, i + group - column % group)
                    if column % group == 0:
                        # the block's own columns are newest in `w`, later ones in `W`
                        ahead = [w[i : i + group].T]
                        if keep is not None and together == 1:
                            ahead = [(w[i : i + group] * keep[i : i + group]).T]
                        if i + group > span:
                            ahead.append(W[:, stop : column + group])
                        fit = constraint.fit(torch.cat(ahead, 1))
                        fitted.append(fit)
                        params = GridParams(fit.scale[:, 0], fit.zero[:, 0], fit.levels[:, 0])
                problem.loop(strip, params, i, after, end)
                i = after
            if end < span:
                w[end:].addmm_(strip.u[begin:end, end:].T, strip.errors[begin:end], alpha=-1)
        loss += 0.5 * strip.errors.square().sum(0)
        Q[:, start:stop] = strip.q.T
        if values is not None and strip.codes is not None:
            values[:, start:stop] = strip.codes.T
        if keep_all is not None and keep is not None:
            keep_all[:, start:stop] = keep.T
        if stop < columns:
            W[:, stop:].addmm_(strip.errors.T, U[start:stop, stop:], alpha=-1)

    if order is not None:
        inverse = order.argsort()
        Q = Q[:, inverse]
        keep_all = keep_all[:, inverse] if keep_all is not None else None
        values = values[:, inverse] if values is not None else None
    codes = None
    if values is not None:
        scales = GridParams(*(torch.cat([getattr(f, k) for f in fitted], 1) for k in ("scale", "zero", "levels")))
        codes = Codes(values.contiguous(), scales.scale, scales.zero, scales.bits, group)
    notes = {"damping": factor.damping, "dead": float(factor.dead.sum())}
    return Solved(Q.contiguous(), codes, keep_all, loss, notes)


def _unordered(factor: Factor) -> Tensor:
    """The dead inputs in the stored order of columns."""
    assert factor.order is not None
    dead = torch.zeros_like(factor.dead)
    dead[factor.order] = factor.dead
    return dead


def _same(groups: Tensor) -> int:
    """How many of the first entries are equal."""
    other = (groups != groups[0]).nonzero()
    return int(other[0]) if len(other) else len(groups)
