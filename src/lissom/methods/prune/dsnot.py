"""DSnoT: repair a mask without training, by exchanging kept and removed weights of a row.

    r = Σ_{removed c} w_c E[x_c]                          the mean error of the row's output
    grow    the removed weight whose w_c E[x_c] / Var[x_c]^γ is largest in the direction of r:   r ← r − w_g E[x_g]
    prune   of the kept weights, by rising |w_c|·‖X_c‖, the first whose removal pushes r back:   r ← r + w_p E[x_p]

repeated while |r| > ``tolerance`` (of the row's output, in units of the mean's own scale) and while |r| falls. Kept weights have
their dense values; every row keeps its number of zeros, and where the start was N:M, exchanges stay inside a group.
Source: Zhang et al., ICLR 2024 (arXiv 2310.08915), algorithm 1; methods/03 §15 (γ = 1, at most 50 exchanges, |r| > 0.1).
Differs: an exchange that would not lower |r| ends its row, so |r| never rises; a weight moves at most once. Works on the mask of
the step before in the recipe; as the first step it starts from ``first``. Follow it with ``refit`` for the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import NM, Fixed, NMByRow, Problem, Solved


@dataclass(frozen=True)
class DSnoT:
    """``first``: the mask where no step came before. ``cycles``: exchanges per row at most. ``tolerance``: on |r|.
    ``power``: γ of the variance.
    """

    first: Literal["wanda", "magnitude"] = "wanda"
    cycles: int = 50
    tolerance: float = 0.1
    power: float = 1.0


def group_of(mask: Tensor) -> int | None:
    """M of the N:M pattern that ``mask`` has, if it has one: every group of M, or every one of a row, keeps equally many."""
    for m in (4, 8, 16, 32):
        if mask.shape[1] % m == 0:
            counts = mask.reshape(len(mask), -1, m).sum(2)
            of_rows = counts.shape[1] > 1 and bool((counts == counts[:, :1]).all())
            if of_rows or int(counts.min()) == int(counts.max()):
                return m
    return None


def exchange(
    W: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, m: int | None, config: DSnoT,
    within: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The repaired mask of one layer; ``within``: weights that may be kept."""
    mask = mask.clone()
    pull = W * mean  # removing c adds this to r
    r = torch.where(mask, 0.0, pull).sum(1)
    grow_score = pull / variance.clamp_min(1e-12).pow(config.power)
    prune_score = W.abs() * norm
    movable = torch.ones_like(mask) if within is None else within.clone()
    each = torch.arange(len(W))
    active = r.abs() > config.tolerance
    for _ in range(config.cycles):
        if not bool(active.any()):
            break
        sign = r.sign()[:, None]
        g = torch.where(~mask & movable, grow_score * sign, -float("inf")).argmax(1)
        after = r - pull[each, g]
        open_ = mask & movable & (pull * after.sign()[:, None] < 0)
        if m is not None:
            open_ &= (torch.arange(W.shape[1]) // m) == (g // m)[:, None]
        p = torch.where(open_, prune_score, float("inf")).argmin(1)
        new = after + pull[each, p]
        active &= open_[each, p] & ~mask[each, g] & (new.abs() < r.abs())
        rows = each[active]
        mask[rows, g[rows]] = True
        mask[rows, p[rows]] = False
        movable[rows, g[rows]] = False
        movable[rows, p[rows]] = False
        r = torch.where(active, new, r)
        active &= r.abs() > config.tolerance
    return mask


def dsnot(problem: Problem, config: DSnoT) -> Solved:
    """Repair the mask of the step before; weights keep their dense values."""
    stats, W = problem.stats, problem.weight
    repairing = problem.start is not None and problem.start.mask is not None
    if repairing:
        assert problem.start is not None and problem.start.mask is not None
        mask = problem.start.mask
    else:
        score = W.abs() * stats.norm if config.first == "wanda" else W.abs()
        mask = problem.constraint.select(score)
    out = []
    for rows, part in problem.constraint.slices():
        # a mask that is given, and does not come from the step before, is kept
        if part.pattern is None or (isinstance(part.pattern, Fixed) and not repairing):
            out.append(mask[rows])
            continue
        m = part.pattern.m if isinstance(part.pattern, NM | NMByRow) else group_of(mask[rows])
        out.append(exchange(W[rows], mask[rows], stats.mean, stats.variance, stats.norm, m, config, part.within))
    mask = torch.cat(out)
    repaired = Problem(W, stats, problem.constraint.freeze(mask), problem.names)
    return repaired.project(mask.to(W.dtype))
