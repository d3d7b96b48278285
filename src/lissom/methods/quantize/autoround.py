"""AutoRound (SignRound): learn by signed gradients which way each weight is rounded and how far ranges shrink.

    q = clamp(round(W/s + V) + z, 0, 2^b − 1),   V ∈ [−½, ½],   s, z from α·max W and β·min W,  α, β ∈ [½, 1]
    loss = tr(Δ H Δᵀ),  Δ = s (q − z) − W         the mean squared output of the layer, from the Gram matrix
    θ ← θ − lr · sign(∂loss/∂θ),   lr falling linearly from 1/iterations to 0;   the best iterate is returned

W: (out, in). The gradient passes straight through the rounding; V moves inside its box only, so each integer differs
from round-to-nearest on the same range by at most one. Zeros of a mask stay exact. No activations are needed.
Source: Cheng et al. 2023 (arXiv 2309.05516), algorithm 1; intel/auto-round; methods/02 §23. Differs: the loss is the
layer's, not the block's; the best iterate is kept for each row, whose losses are independent; α, β start from the
constraint's range; symmetric grids learn α only. ``iterations`` 0 is round to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, Problem, Solved, damped
from ...core.grid import spread_groups
from .common import finish, grids, half, start


@dataclass(frozen=True)
class AutoRound:
    """``iterations``; ``lr`` None = 1/iterations; ``learn_range``: α and β too; ``floor`` of α, β; ``damping`` of H."""

    iterations: int = 200
    lr: float | None = None
    learn_range: bool = True
    floor: float = 0.5
    damping: float = 0.01


def _through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return x + (torch.round(x) - x).detach()


@torch.enable_grad()  # compression runs without gradients
def autoround(problem: Problem, config: AutoRound) -> Solved:
    """All layers of the stack at once."""
    grids(problem, "autoround")
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

    def grid_of(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (fp16-exact in value) and zero point under the shrunk range, (out, groups)."""
        beta = torch.where(symmetric, alpha, beta)
        scale = (high * alpha - low * beta) / top
        scale = scale + (half(scale.detach()) - scale.detach())
        zero = torch.where(symmetric, fitted.zero, _through(-low * beta / scale))
        return scale, torch.minimum(zero.clamp_min(0), top)

    def codes_of(V: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, z, t = (spread_groups(x, columns, group) for x in (scale, zero, top))
        q = torch.minimum((_through(W / s + V) + z).clamp_min(0), t)
        return (q if mask is None else torch.where(mask, q, z)), s, z

    V = torch.zeros_like(W, requires_grad=True)
    alpha = torch.ones_like(fitted.scale, requires_grad=True)
    beta = torch.ones_like(fitted.scale, requires_grad=True)
    lr = config.lr if config.lr is not None else 1 / max(1, config.iterations)
    best = torch.full((len(W), 1), torch.inf)
    kept = [torch.empty_like(W), fitted.scale, fitted.zero]
    first = 0.0
    for i in range(config.iterations + 1):
        scale, zero = grid_of(alpha, beta)
        q, s, z = codes_of(V, scale, zero)
        delta = (q - z) * s - target
        with torch.no_grad():
            slope = delta @ H
            loss = (slope * delta).sum(1, keepdim=True)
            better = loss < best
            best = torch.where(better, loss, best)
            new = (q, scale, zero)
            kept = [torch.where(better, n.detach(), k) for n, k in zip(new, kept, strict=True)]
            first = float(loss.sum()) if i == 0 else first
        if i == config.iterations:
            break
        # d loss/d delta = 2 slope: H is constant, so one product serves loss and gradient
        delta.backward(slope)
        step = lr * (1 - i / config.iterations)
        with torch.no_grad():
            for theta, floor, ceiling in ((V, -0.5, 0.5), (alpha, config.floor, 1.0), (beta, config.floor, 1.0)):
                if theta.grad is not None and (theta is V or config.learn_range):
                    theta -= step * theta.grad.sign()
                    theta.clamp_(floor, ceiling)
                theta.grad = None
    codes = Codes(kept[0].to(torch.uint8), kept[1].contiguous(), kept[2].contiguous(), fitted.bits, group)
    notes = {"loss_start": first, "loss_end": float(best.sum())}
    return finish(problem, codes, mask=mask, notes=notes, damping=config.damping)
