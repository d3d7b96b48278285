"""ALPS: choose the zeros by ADMM on the layer's error, then solve for the kept weights.

    minimise ½ tr((Ŵ − W) H (Ŵ − W)ᵀ)   subject to Ŵ ∈ pattern
    split into B, smooth, and D, with zeros; V the multiplier:

    B ← (W H − V + ρ D)(H + ρ I)⁻¹          D ← keep the largest |B + V/ρ|          V ← V + ρ (B − D)
    at the end: conjugate gradients on the support of D (:mod:`.least_squares`)

H is damped and scaled to unit diagonal (W takes the inverse scale), so that one ρ suits all inputs. ρ rises by 1.3, 1.2 or
1.1 every ``interval`` iterations, faster the more the support still moves. The inverse is applied through H = QΛQᵀ, made
once for all layers that share the input; where it is cheaper it is formed for each ρ, which halves the products.

Cost: in³ once, then 2·out·in² (or half) per iteration. Layer error against SparseGPT's = 1 and seconds on one core, at 70%,
strongly correlated inputs: 1536×576 SparseGPT 0.1 s, refit of its mask 0.62, ALPS 0.36; an exhaustive search of swaps
afterwards gains 2% more at ten times the cost.

Source: Meng, Behdin, Wang, Mazumder, NeurIPS 2024 (arXiv 2406.07831), algorithm 1; methods/03 §16.
Differs: layers with one input are one stack under budgets of their own; ρ starts at 0.03 instead of 0.1 (a lower error
for half as many iterations again); no restart (ρ/5) when the support does not move at first; the final CG starts from D and
has a tolerance instead of ten steps. Starting D from SparseGPT's weights changes nothing and is left out. A grid in the
constraint is met by a last error-feedback sweep on the frozen mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import Both, Fixed, Problem, Solved, Stack, damped
from .least_squares import Refit, on_support


@dataclass(frozen=True)
class ALPS:
    """``iterations`` of ADMM at most; ``rho`` the first penalty (of a unit diagonal); ``interval``: iterations between
    raises of ρ; ``settled``: stop when a smaller share of the support changed within an interval; ``tolerance``: of the
    final CG; ``damping``: fraction of mean(diag H) added.
    """

    iterations: int = 60
    rho: float = 0.03
    interval: int = 3
    settled: float = 3e-4
    tolerance: float = 1e-3
    damping: float = 0.01


class _Shifted:
    """Products with ``(H + ρ I)⁻¹`` for changing ρ."""

    def __init__(self, H: Tensor, rows: int, interval: int):
        self.values, self.vectors = torch.linalg.eigh(H)
        # an explicit inverse costs in³ for each ρ and saves rows·in² for each product
        self.explicit = rows * interval > len(H)
        self.rho = -1.0
        self.inverse = self.vectors

    def __call__(self, x: Tensor, rho: float) -> Tensor:
        Q = self.vectors
        if not self.explicit:
            return ((x @ Q) / (self.values + rho)) @ Q.T
        if rho != self.rho:
            self.inverse, self.rho = (Q / (self.values + rho)) @ Q.T, rho
        return x @ self.inverse


def admm(H: Tensor, W: Tensor, pattern: Stack, config: ALPS) -> tuple[Tensor, Tensor, int]:
    """Support (bool, (rows, in)), weights on it, and iterations done; H has unit diagonal."""
    solve = _Shifted(H, len(W), config.interval)
    G = W @ H
    D, V = W, torch.zeros_like(W)
    rho = config.rho
    support = before = pattern.select(W.abs())
    done = 0
    for done in range(1, config.iterations + 1):
        moved = torch.add(solve(torch.add(G, D, alpha=rho).sub_(V), rho), V, alpha=1 / rho)  # B + V/ρ
        support = pattern.select(moved.abs())
        D = torch.where(support, moved, 0.0)
        V = (moved - D).mul_(rho)  # V + ρ(B − D)
        if done % config.interval == 0:
            change = float((support != before).sum()) / max(1, int(before.sum()))
            before = support
            if change < config.settled:
                break
            rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    return support, D, done


def alps(problem: Problem, config: ALPS) -> Solved:
    """ADMM for the support (unless it is fixed already), then the best weights on it."""
    pattern = Stack(tuple((rows, Both(part.pattern)) for rows, part in problem.constraint.parts))
    H, dead = damped(problem.stats.hessian, config.damping)
    scale = H.diagonal().sqrt()
    W = torch.where(dead, 0.0, problem.weight)
    done = 0
    if all(part.pattern is None or isinstance(part.pattern, Fixed) for _, part in pattern.parts):
        mask = pattern.select(W)
        start = W if problem.start is None else problem.start.weight
    else:
        mask, D, done = admm(H / scale / scale[:, None], W * scale, pattern, config)
        start = D / scale
    solved = on_support(problem, mask, start, Refit("cg", config.tolerance, damping=config.damping))
    return replace(solved, notes={**solved.notes, "admm_iterations": float(done)})
