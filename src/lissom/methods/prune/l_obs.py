"""L-OBS, exactly: remove one weight at a time, always the cheapest, and update the inverse of every row.

    repeat in row r:   q = argmin w_q² / [A]_qq,      A = (H_SS)⁻¹ over the weights S still there
                       w ← w − (w_q / A_qq) A_q,      A ← A − A_q A_qᵀ / A_qq      (row and column q leave)

Each row has an inverse of its own, of which a batch of rows is held at once. Rows are independent, so a budget for the layer is
met by following every row to its end and keeping, over all rows, the removals with the smallest loss (each counted not
below those before it in its row, so that removals stay in order). N:M: a group that has lost M − N is left alone.
Greedy updates end at the least-squares weights on the support that is left, which are computed directly at the end.

Cost: out·in³ multiplications bound by memory; for oracles and small layers (SparseGPT exists because of it).
Sources: Hassibi & Stork 1992; Dong, Chen, Pan 2017 (arXiv 1705.07565) for the layer-wise form; the budget over rows as in OBC,
Frantar & Alistarh 2022 (arXiv 2208.11580), algorithm 2; methods/03 §3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import NM, Fixed, Problem, Solved, damped
from .least_squares import Refit, on_support

_BATCH_NUMBERS = 2**24  # numbers of inverses held at once: 64 MiB


@dataclass(frozen=True)
class LOBS:
    """``damping``: fraction of mean(diag H) added."""

    damping: float = 0.01


def removal_losses(H: Tensor, W: Tensor, group: NM | None = None) -> Tensor:
    """Loss at which each weight goes, (rows, in), never falling within a row; infinite for weights that an N:M keeps."""
    rows, columns = W.shape
    inverse = torch.linalg.inv(H.double()).to(W.dtype)
    out = torch.full_like(W, float("inf"))
    per_batch = max(1, _BATCH_NUMBERS // columns**2)
    steps = columns if group is None else columns // group.m * (group.m - group.n)
    for start in range(0, rows, per_batch):
        w = W[start : start + per_batch].clone()
        A = inverse.expand(len(w), -1, -1).clone()
        each = torch.arange(len(w))
        free = torch.ones_like(w, dtype=torch.bool)
        worst = torch.zeros(len(w))
        for _ in range(steps):
            pivot = A.diagonal(dim1=1, dim2=2)
            loss = torch.where(free, w.square() / (2 * pivot.clamp_min(1e-30)), float("inf"))
            if group is not None:
                full = (~free).reshape(len(w), -1, group.m).sum(2) >= group.m - group.n
                loss.masked_fill_(full.repeat_interleave(group.m, 1), float("inf"))
            q = loss.argmin(1)
            worst = torch.maximum(worst, loss[each, q])
            out[start + each, q] = worst
            row = A[each, q]
            scale = 1 / row[each, q].clamp_min(1e-30)
            w -= (w[each, q] * scale)[:, None] * row
            A.baddbmm_(row[:, :, None], (row * scale[:, None])[:, None, :], alpha=-1)
            w[each, q] = 0
            free[each, q] = False
    return out


def l_obs(problem: Problem, config: LOBS) -> Solved:
    """Exact greedy removal, then the least-squares weights on what is left."""
    H, dead = damped(problem.stats.hessian, config.damping)
    W = torch.where(dead, 0.0, problem.weight)
    mask = torch.ones_like(W, dtype=torch.bool)
    for rows, part in problem.constraint.slices():
        if part.pattern is None or part.pattern.p == 0:
            continue
        if isinstance(part.pattern, Fixed):
            mask[rows] = part.pattern.mask
            continue
        group = part.pattern if isinstance(part.pattern, NM) else None
        mask[rows] = part.select(removal_losses(H, W[rows], group))
    return on_support(problem, mask, W, Refit("exact", damping=config.damping))
