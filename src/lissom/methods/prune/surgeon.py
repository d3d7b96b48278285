"""LLM Surgeon: prune elements, rows or columns by Kronecker-factored curvature, and update everything that is left.

    F ≈ G ⊗ A        A = E[x xᵀ] (in, in), of the inputs;   G = E[g gᵀ] (out, out), of the gradients at the outputs
    element  ½ W_rc² / ([G⁻¹]_rr [A⁻¹]_cc)      row  ½ W_r A W_rᵀ / [G⁻¹]_rr      column  ½ W_cᵀ G W_c / [A⁻¹]_cc
    update   minimise ½ tr(G Δ A Δᵀ) with the removed weights fixed at −W: the joint optimum for the whole removed set

Several ``shots`` reach the sparsity in linear steps; each scores the weights as updated so far. Needs ``extras["output_gram"]``.
Source: van der Ouderaa, Nagel, van Baalen, Asano, Blankevoort, ICLR 2024 (arXiv 2312.17244), eqs. 6–11; methods/03 §10.
Differs: the joint update is solved by conjugate gradients with the two factors, which lifts the paper's limit of 2000 correlated
weights; the factors are those of the start of the run, because a solver cannot re-estimate them (the paper does, every
shot; the pipeline streams each block once); the threshold is by layer instead of global, budgets are the allocation's
business. With G = I this is L-OBS's score with the exact joint update. Rows and columns: the count is rounded to whole units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Fixed, Problem, Solved, Sparse, damped, keep_largest
from .least_squares import Refit, on_support


@dataclass(frozen=True)
class Surgeon:
    """``unit`` removed together; ``shots``; ``damping`` of A and ``damping_out`` of G, fractions of their mean diagonals;
    ``tolerance`` and ``iterations`` of the update.
    """

    unit: Literal["element", "row", "column"] = "element"
    shots: int = 5
    damping: float = 0.01
    damping_out: float = 0.1
    tolerance: float = 1e-4
    iterations: int = 200


def joint_update(
    W: Tensor, mask: Tensor, A: Tensor, G: Tensor, tolerance: float, iterations: int, start: Tensor
) -> Tensor:
    """Weights on ``mask`` that minimise ½ tr(G (Ŵ − W) A (Ŵ − W)ᵀ), (out, in)."""
    preconditioner = 1 / (G.diagonal()[:, None] * A.diagonal())
    target = G @ W @ A
    x = torch.where(mask, start, 0.0)
    r = torch.where(mask, target - G @ x @ A, 0.0)
    limit = tolerance**2 * float((target.square() * preconditioner * mask).sum())
    z = r * preconditioner
    p, rz = z, float((r * z).sum())
    for _ in range(iterations):
        if rz <= limit:
            break
        q = torch.where(mask, G @ p @ A, 0.0)
        curvature = float((p * q).sum())
        if curvature <= 0:
            break
        alpha = rz / curvature
        x, r = x + alpha * p, r - alpha * q
        z = r * preconditioner
        new = float((r * z).sum())
        p, rz = z + (new / rz) * p, new
    return x


def unit_costs(W: Tensor, A: Tensor, G: Tensor, inverse_A: Tensor, inverse_G: Tensor, unit: str) -> Tensor:
    """Cost of each unit alone, broadcast to (out, in); ``inverse_*``: diagonals of the inverses."""
    if unit == "row":
        return (0.5 * ((W @ A) * W).sum(1) / inverse_G)[:, None].expand_as(W)
    if unit == "column":
        return (0.5 * ((G @ W) * W).sum(0) / inverse_A).expand_as(W)
    return 0.5 * W.square() / (inverse_G[:, None] * inverse_A)


def _keep(costs: Tensor, pattern: object, share: float, unit: str) -> Tensor:
    """Keep-mask at ``share`` of the way to the pattern's sparsity."""
    if not isinstance(pattern, Sparse):  # N:M and given masks have no half-way pattern
        return pattern.select(costs)  # type: ignore[attr-defined]
    if unit == "row":
        return keep_largest(costs[:, :1].T, round(share * pattern.p * len(costs))).T.expand_as(costs)
    if unit == "column":
        return keep_largest(costs[:1], round(share * pattern.p * costs.shape[1])).expand_as(costs)
    return Sparse(share * pattern.p, pattern.per).select(costs)


def surgeon(problem: Problem, config: Surgeon) -> Solved:
    """Shots of choosing and updating, layer by layer of the stack."""
    A, dead = damped(problem.stats.hessian / 2, config.damping)
    inverse_A = torch.linalg.inv(A).diagonal()
    whole = problem.extra("output_gram", "llm-surgeon")
    weights, masks = [], []
    for rows, part in problem.constraint.slices():
        W = torch.where(dead, 0.0, problem.weight[rows])
        mask, weight = torch.ones_like(W, dtype=torch.bool), W
        if part.pattern is not None and part.pattern.p > 0:
            G, _ = damped(whole[rows, rows], config.damping_out)
            inverse_G = torch.linalg.inv(G).diagonal()
            shots = config.shots if isinstance(part.pattern, Sparse) else 1
            for shot in range(1, shots + 1):
                costs = unit_costs(weight, A, G, inverse_A, inverse_G, config.unit)
                costs = torch.where(mask, costs, -1.0)  # what is gone stays gone
                mask = _keep(costs, part.pattern, shot / shots, config.unit)
                if isinstance(part.pattern, Fixed):
                    mask = part.pattern.mask
                weight = joint_update(W, mask, A, G, config.tolerance, config.iterations, weight)
        weights.append(weight)
        masks.append(mask)
    mask, weight = torch.cat(masks), torch.cat(weights)
    if problem.constraint.quantized:
        return on_support(problem, mask, weight, Refit("cg", iterations=0, damping=config.damping))
    return Solved(weight, None, mask, problem.error(weight, config.damping))
