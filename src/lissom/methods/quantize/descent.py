"""GPTQ, then coordinate descent on the codes and least squares on the scales, until the layer's error settles.

    minimise   tr(Δ H Δᵀ),   Δ = Q − W,   Q = s (C − z)
    codes      C_j ← clamp(round((Q_j − (Δ H)_j / H_jj)/s) + z)        one column at a time, all else fixed
    scales     (Aᵀ H A) s = Aᵀ H w for each row, A = blockdiag(C_g − z_g)    all groups of a row together

W: (out, in). GPTQ decides every column once and never returns; a pass of coordinate descent returns to each with all
others known, and never raises the error. Scales are rounded to half precision and a row keeps its old ones when the
new ones are no better, so the error falls monotonically. Zeros of a mask stay exact. A pass costs as much as GPTQ.
Sources: Behdin et al. 2023, QuantEase (arXiv 2309.01885) for the descent; the start is GPTQ (2210.17323).
Differs: scales are re-fitted between passes (closed form, with the full H); ranges start from the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...core import Both, Codes, Grid, GridParams, Problem, Solved, Stack, damped, sweep
from ...core.grid import spread_groups
from .common import finish, grids, start
from .coordinate import descend, refit


@dataclass(frozen=True)
class Descent:
    """``passes`` over the columns; ``refit``: scales by least squares before each pass; ``range``: of the starting grids
    (``constraint`` keeps the step's); ``act_order`` as in GPTQ; ``damping`` of H for the sweep and the descent."""

    passes: int = 4
    refit: bool = True
    range: Literal["constraint", "mse"] = "mse"
    act_order: bool = True
    damping: float = 0.01


def polish(problem: Problem, codes: Codes, mask: Tensor | None, levels: Tensor, config: Descent) -> Codes:
    """Alternate :func:`refit` and :func:`descend` from ``codes``; ``levels`` (out, 1) = 2^bits of each row."""
    H, dead = damped(problem.stats.hessian, config.damping)
    W = torch.where(dead, torch.zeros_like(problem.weight), problem.weight)  # the dense ones, whatever was pruned
    columns, group = W.shape[1], codes.group_size
    code, scale, zero = codes.values.float(), codes.scale, codes.zero
    for _ in range(config.passes):
        if config.refit:
            scale = refit(W, H, code, GridParams(scale, zero, levels), group)
        wide = [spread_groups(t, columns, group) for t in (scale, zero)]
        code = descend(W, H, code, GridParams(wide[0], wide[1], levels.expand(-1, columns)), mask)
    return replace(codes, values=code.to(torch.uint8), scale=scale)


def descent(problem: Problem, config: Descent) -> Solved:
    """GPTQ with static groups, then :func:`polish`."""
    grids(problem, "gptq-descent")
    W, mask = start(problem)
    fitted = problem
    if config.range == "mse":
        fitted = replace(problem, constraint=_with_range(problem.constraint))
    if mask is not None:
        fitted = replace(fitted, constraint=fitted.constraint.freeze(mask))
    first = sweep(fitted, problem.factor(config.damping, config.act_order), static_groups=True, target=W)
    assert first.codes is not None
    levels = torch.cat([torch.full((n, 1), 2.0**p.grid.bits) for n, p in problem.constraint.parts if p.grid])
    codes = polish(problem, first.codes, mask, levels, config)
    before = float(problem.error(first.weight, config.damping).sum())
    solved = finish(problem, codes, mask=mask, notes=first.notes, damping=config.damping)
    return replace(solved, notes={**first.notes, "error_of_gptq": before, "error": float(solved.error.sum())})


def _with_range(stack: Stack) -> Stack:
    def searched(grid: Grid | None) -> Grid | None:
        return None if grid is None else replace(grid, range="mse")

    return Stack(tuple((n, Both(p.pattern, searched(p.grid))) for n, p in stack.parts))
