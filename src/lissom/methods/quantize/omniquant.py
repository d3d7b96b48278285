"""OmniQuant's learnable weight clipping (LWC): the ends of every group's range are learned by gradients.

    s = (σ(γ) max W − σ(β) min W)/(2^b − 1),    z = round(−σ(β) min W / s),    γ, β ← Adam on tr(Δ H Δᵀ)

W: (out, in); γ, β: (out, groups), 4.0 at first (σ ≈ .98). Rounding passes gradients straight through. Weights stay
frozen, so the result is round-to-nearest on a better range, in plain integer codes; a mask's zeros stay exact. The
other half of the paper, the learnable equivalent transform, is SmoothQuant's and AWQ's scale.
Source: Shao et al., ICLR 2024 (arXiv 2308.13137), eq. 2; methods/02 §21. Differs: the loss is the layer's, from its Gram
matrix (no data kept), not the block's; each row keeps its best iterate, the first one included; symmetric
grids learn one end. ``steps`` 0 is the min-max range as it is (the paper would start from σ(4)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, Problem, Solved, damped
from ...core.grid import spread_groups
from .common import Adam, finish, grids, half, start


@dataclass(frozen=True)
class OmniQuant:
    """``steps`` of Adam with rate ``lr``; ``init`` of γ and β; ``damping`` of H."""

    steps: int = 100
    lr: float = 0.05
    init: float = 4.0
    damping: float = 0.01


@torch.enable_grad()  # compression runs without gradients
def omniquant(problem: Problem, config: OmniQuant) -> Solved:
    """All layers of the stack at once."""
    grids(problem, "omniquant")
    W, mask = start(problem)
    H, dead = damped(problem.stats.hessian, config.damping)
    W = torch.where(dead, torch.zeros_like(W), W)
    target = torch.where(dead, torch.zeros_like(W), problem.weight)
    columns = W.shape[1]
    group = min(problem.constraint.group_size or columns, columns)
    fitted = problem.constraint.fit_all(W)
    top = fitted.levels - 1
    symmetric = torch.cat([torch.full((n, 1), p.grid.symmetric) for n, p in problem.constraint.parts if p.grid])
    low, high = -fitted.zero * fitted.scale, (top - fitted.zero) * fitted.scale

    def through(x: Tensor) -> Tensor:
        return x + (torch.round(x) - x).detach()

    def project(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        s, z, t = (spread_groups(x, columns, group) for x in (scale, zero, top))
        q = torch.minimum((through(W / s) + z).clamp_min(0), t)
        q = q if mask is None else torch.where(mask, q, z)
        return q, (q - z) * s - target

    gamma = torch.full_like(fitted.scale, config.init, requires_grad=True)
    beta = torch.full_like(fitted.scale, config.init, requires_grad=True)
    optimizer = Adam([gamma, beta], config.lr)
    kept = [project(fitted.scale, fitted.zero)[0], fitted.scale, fitted.zero]
    start_delta = project(fitted.scale, fitted.zero)[1]
    best = ((start_delta @ H) * start_delta).sum(1, keepdim=True)
    first = float(best.sum())
    for _ in range(config.steps):
        upper = torch.sigmoid(gamma)
        lower = torch.where(symmetric, upper, torch.sigmoid(beta))
        scale = (high * upper - low * lower) / top
        scale = scale + (half(scale.detach()) - scale.detach())
        zero = torch.where(symmetric, fitted.zero, through(-low * lower / scale))
        zero = torch.minimum(zero.clamp_min(0), top)
        q, delta = project(scale, zero)
        with torch.no_grad():
            slope = delta @ H
            loss = (slope * delta).sum(1, keepdim=True)
            better = loss < best
            best = torch.where(better, loss, best)
            kept = [torch.where(better, n.detach(), k) for n, k in zip((q, scale, zero), kept, strict=True)]
            # rows are independent: dividing by their loss gives all of them the same say in Adam's early steps
            slope = slope / loss.clamp_min(1e-30)
        delta.backward(slope)
        optimizer.step()
    codes = Codes(kept[0].to(torch.uint8), kept[1].contiguous(), kept[2].contiguous(), fitted.bits, group)
    notes = {"loss_start": first, "loss_end": float(best.sum())}
    return finish(problem, codes, mask=mask, notes=notes, damping=config.damping)
