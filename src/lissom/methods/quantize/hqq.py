"""HQQ: find zero points that make the error sparse, without data.

    minimise over z   ‖W − s (Q − z)‖_p^p,   Q = clamp(round(W/s + z)),   p < 1
    half-quadratic    W_e = shrink_p(W − s (Q − z), β),   z = mean_group(Q − (W − W_e)/s),   β ← κβ
    shrink_p(e, β)    sign(e) · relu(|e| − |e|^(p−1)/β)

W: (out, in), a z per group. Stops when mean |W − Ŵ| rises; a group keeps its first (min-max) grid when that is better
in ‖·‖_p^p. ``zero="float"`` stores ŵ = code·s − z·s (GGUF's Q4_1 layout); ``"integer"`` rounds the zero point, so that
zeros of a mask stay exact and integer formats can hold it. A mask forces ``integer``.
Source: Badri & Shaji, Mobius Labs blog, 2023 (mobiusml/hqq); methods/02 §19. Differs: per-group guard, fp16 scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Affine, Codes, GridParams, Problem, Solved
from ...core.grid import spread_groups
from .common import finish, grids, half, start


@dataclass(frozen=True)
class HQQ:
    """Names as in the module; ``rounds`` at most."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20
    zero: Literal["integer", "float"] = "float"


def shrink(e: Tensor, beta: float, p: float) -> Tensor:
    """Generalised soft threshold; p = 1 is the soft threshold by 1/β."""
    size = e.abs()
    return e.sign() * torch.relu(size - size.clamp_min(1e-12).pow(p - 1) / beta)


def optimise_zero(W: Tensor, scale: Tensor, zero: Tensor, top: Tensor, config: HQQ) -> Tensor:
    """Zero points (groups, 1), float, for ``W: (groups, n)``."""
    beta, best_error, best = config.beta, torch.inf, zero
    for _ in range(config.rounds):
        Q = torch.minimum(torch.round(W / scale + zero).clamp_min(0), top)
        error = W - (Q - zero) * scale
        size = float(error.abs().mean())
        if size >= best_error:
            break
        best_error, best = size, zero
        zero = (Q - (W - shrink(error, beta, config.p)) / scale).mean(1, keepdim=True)
        beta *= config.kappa
    return best


def hqq(problem: Problem, config: HQQ) -> Solved:
    """Min-max scales, optimised zero points."""
    grids(problem, "hqq")
    W, mask = start(problem)
    params = problem.constraint.fit_all(W)
    columns = W.shape[1]
    group = min(problem.constraint.group_size or columns, columns)
    integer = config.zero == "integer" or mask is not None
    zeros = []
    for g in range(params.scale.shape[1]):
        w = W[:, g * group : (g + 1) * group]
        s, z, top = params.scale[:, g : g + 1], params.zero[:, g : g + 1], params.levels[:, g : g + 1] - 1
        new = optimise_zero(w, s, z, top, config)
        # a zero point beyond the codes, or with an offset that half precision cannot hold, is of no use
        new = torch.minimum(torch.round(new).clamp_min(0), top) if integer else -half(-new * s) / s
        zeros.append(torch.where(_norm(w, s, new, top, config.p) < _norm(w, s, z, top, config.p), new, z))
    zero = torch.cat(zeros, 1)
    if integer:
        chosen = GridParams(params.scale, zero, params.levels)
        return finish(problem, Codes.round(W, chosen, params.bits, group), mask=mask)
    offset = half(-zero * params.scale)
    wide_s, wide_o, wide_l = (spread_groups(t, columns, group) for t in (params.scale, offset, params.levels))
    values = torch.minimum(torch.round((W - wide_o) / wide_s).clamp_min(0), wide_l - 1).to(torch.uint8)
    return finish(problem, stored=Affine(values, params.scale, offset, params.bits, group))


def _norm(w: Tensor, scale: Tensor, zero: Tensor, top: Tensor, p: float) -> Tensor:
    """``‖w − ŵ‖_p^p`` per group, (groups, 1)."""
    Q = torch.minimum(torch.round(w / scale + zero).clamp_min(0), top)
    return (w - (Q - zero) * scale).abs().pow(p).sum(1, keepdim=True)
