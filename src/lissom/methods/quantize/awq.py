"""AWQ: scale up the inputs that matter before rounding to nearest, and undo the scale in what makes the input.

    s = a^r,  a_j = the typical magnitude of input j,  s ← s/√(max s · min s),   Ŵ = Q(W·s)/s
    r ∈ {0, 1/20, …, 19/20} with the least tr(Δ H Δᵀ), Δ = Ŵ − W        (r = 0 is round to nearest)

W: (out, in); s: (in,), shared by all layers of the stack (they share the input). The function of the layer with
s but without rounding is unchanged: x/s folds into the previous norm or linear where that is allowed, else the
factor is stored (:class:`Scaled`). ``clip`` then shrinks each group's range when that lowers the output error.
Source: Lin et al., MLSys 2024 (arXiv 2306.00978), eq. 4–5; mit-han-lab/llm-awq; methods/02 §15. Differs: the error is
the layer's, from the Gram matrix, not the block's; a is the root mean square of the input, which Stats hold, not its
mean magnitude; the clip search weights columns by E[x²] instead of running 512 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, GridParams, Problem, Scaled, Solved, damped
from ...core.grid import spread_groups
from .common import finish, grids, half, start


@dataclass(frozen=True)
class AWQ:
    """``steps`` of the exponent grid; ``clip``: search ranges down to 1 − ``max_shrink``; ``damping`` of H."""

    steps: int = 20
    clip: bool = True
    max_shrink: float = 0.5
    damping: float = 0.01


def awq_scale(W: Tensor, problem: Problem, config: AWQ) -> tuple[Tensor, dict[str, float]]:
    """The per-input scale s (in,), fp16-exact, and notes: the exponent and the relative error at r = 0 and at the best.

    To fold: divide the gain of the previous norm (or the rows of the previous linear) by s, multiply W by s.
    """
    H, _ = damped(problem.stats.hessian, config.damping)
    a = (problem.stats.sumsq / max(problem.stats.count, 1)).clamp_min(0).sqrt()
    best, least, first, exponent = torch.ones_like(a), torch.inf, torch.inf, 0.0
    for i in range(config.steps):
        s = a.pow(i / config.steps).clamp_min(1e-4)
        s = half(s / (s.max() * s.min()).sqrt())
        if not bool(((s > 0) & torch.isfinite(s)).all()):
            continue
        delta = _round(problem, W * s).decode() / s - W
        loss = float(((delta @ H) * delta).sum())
        first = loss if i == 0 else first
        if loss < least:
            best, least, exponent = s, loss, i / config.steps
    energy = max(float(((W @ H) * W).sum()), 1e-30)
    return best, {"exponent": exponent, "error_unscaled": first / energy, "error_scaled": least / energy}


def awq_fold(problem: Problem, config: AWQ) -> tuple[Tensor, dict[str, float]]:
    """s and notes for a pipeline that folds; the problem's grid is that of the step that rounds."""
    grids(problem, "awq")
    return awq_scale(problem.weight, problem, config)


def _round(problem: Problem, W: Tensor) -> Codes:
    params = problem.constraint.fit_all(W)
    return Codes.round(W, params, params.bits, problem.constraint.group_size)


def clipped(problem: Problem, W: Tensor, importance: Tensor, config: AWQ) -> GridParams:
    """Grids whose ranges are shrunk in steps of 5% where that lowers Σ_j importance_j (ŵ_j − w_j)² of a group."""
    columns = W.shape[1]
    group = min(problem.constraint.group_size or columns, columns)
    best = problem.constraint.fit_all(W)
    groups = best.scale.shape[1]
    owner = (torch.arange(columns) // group).expand(len(W), columns)
    wide = [spread_groups(t, columns, group) for t in _ranges(W, group, groups)]
    error = torch.full_like(best.scale, torch.inf)
    steps = max(1, round(config.max_shrink / 0.05))
    for i in range(steps):
        shrink = 1 - 0.05 * i
        narrow = torch.minimum(torch.maximum(W, wide[0] * shrink), wide[1] * shrink)
        trial = problem.constraint.fit_all(narrow)
        delta = Codes.round(W, trial, trial.bits, group).decode() - W
        loss = torch.zeros_like(best.scale).scatter_add_(1, owner, delta.square() * importance)
        better = loss < error
        error = torch.where(better, loss, error)
        best = GridParams(
            torch.where(better, trial.scale, best.scale), torch.where(better, trial.zero, best.zero), best.levels
        )
    return best


def _ranges(W: Tensor, group: int, groups: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(W, (0, groups * group - W.shape[1])).reshape(len(W), groups, group)
    return padded.amin(2), padded.amax(2)


def awq(problem: Problem, config: AWQ) -> Solved:
    """Search s, clip, round; the result is stored as codes of W·s and the factor 1/s (plain codes when s = 1)."""
    grids(problem, "awq")
    W, mask = start(problem)
    s, notes = awq_scale(W, problem, config)
    scaled = W * s
    mean_square = problem.stats.sumsq / max(problem.stats.count, 1) / s.square()
    params = clipped(problem, scaled, mean_square, config) if config.clip else problem.constraint.fit_all(scaled)
    codes = Codes.round(scaled, params, params.bits, problem.constraint.group_size)
    if bool((s == 1).all()):
        return finish(problem, codes, mask=mask, notes=notes, damping=config.damping)
    return finish(problem, stored=Scaled(codes, 1 / s), mask=mask, notes=notes, damping=config.damping)
