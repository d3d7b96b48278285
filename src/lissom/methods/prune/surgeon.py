"""LLM Surgeon: prune elements, rows or columns by Kronecker-factored curvature, and update everything that is left.

    F ≈ G ⊗ A        A = E[x xᵀ] (in, in), of the inputs;   G = E[g gᵀ] (out, out), of the gradients at the outputs
    element  ½ W_rc² / ([G⁻¹]_rr [A⁻¹]_cc)      row  ½ W_r A W_rᵀ / [G⁻¹]_rr      column  ½ W_cᵀ G W_c / [A⁻¹]_cc
    update   minimise ½ tr(G Δ A Δᵀ) with the removed weights fixed at −W: the joint optimum for the whole removed set

What goes as a whole is the constraint's ``unit``. Several ``steps`` reach the sparsity linearly under the factors of one run, each
scoring the weights as updated so far; ``shots`` of the recipe (the paper has 40) estimate the factors again each time. Needs
``extras["output_gram"]``. Source: van der Ouderaa, Nagel, van Baalen, Asano, Blankevoort, ICLR 2024 (arXiv 2312.17244), eqs. 6–11;
methods/03 §10. Differs: the joint update is solved by conjugate gradients with the two factors, which lifts the paper's limit
of 2000 correlated weights; the threshold is by layer unless the recipe says ``per: global``. With G = I this is L-OBS's score
with the exact joint update. Units of other shapes than rows and columns cost the sum of their elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import NM, Both, Fixed, NMByRow, Problem, Solved, Sparse, damped
from .least_squares import Refit, on_support


@dataclass(frozen=True)
class Surgeon:
    """``steps`` of choosing and updating; ``damping`` of A and ``damping_out`` of G, fractions of their mean diagonals;
    ``tolerance`` and ``iterations`` of the update.
    """

    steps: int = 5
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


def unit_costs(W: Tensor, A: Tensor, G: Tensor, inverse_A: Tensor, inverse_G: Tensor, unit: tuple[int, int]) -> Tensor:
    """Cost of each unit alone, in equal shares on its weights, (out, in); ``inverse_*``: diagonals of the inverses."""
    rows, columns = W.shape
    if unit == (1, 0):
        return (((W @ A) * W).sum(1) / (2 * columns * inverse_G))[:, None].expand_as(W)
    if unit == (0, 1):
        return (((G @ W) * W).sum(0) / (2 * rows * inverse_A)).expand_as(W)
    return 0.5 * W.square() / (inverse_G[:, None] * inverse_A)


def _part_way(part: Both, share: float) -> Both:
    """The constraint at ``share`` of its zeros."""
    pattern = part.pattern
    if isinstance(pattern, Sparse | NMByRow):
        return replace(part, pattern=replace(pattern, p=share * pattern.p))
    if isinstance(pattern, NM):
        return replace(part, pattern=NM(pattern.m - round(share * (pattern.m - pattern.n)), pattern.m))
    return part


def _unit(part: Both) -> tuple[int, int]:
    return part.pattern.unit if isinstance(part.pattern, Sparse) else (1, 1)


def surgeon_score(problem: Problem, config: Surgeon) -> Tensor:
    """Costs of the weights as they are, (out, in)."""
    A, dead = damped(problem.stats.hessian / 2, config.damping)
    inverse_A = torch.linalg.inv(A).diagonal()
    whole, out = problem.extra("output_gram", "llm-surgeon"), []
    for rows, part in problem.constraint.slices():
        G, _ = damped(whole[rows, rows], config.damping_out)
        W = torch.where(dead, 0.0, problem.weight[rows])
        out.append(unit_costs(W, A, G, inverse_A, torch.linalg.inv(G).diagonal(), _unit(part)))
    return torch.cat(out)


def surgeon(problem: Problem, config: Surgeon) -> Solved:
    """Steps of choosing and updating, layer by layer of the stack."""
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
            steps = 1 if isinstance(part.pattern, Fixed) else config.steps
            for step in range(1, steps + 1):
                costs = unit_costs(weight, A, G, inverse_A, inverse_G, _unit(part))
                costs = torch.where(mask, costs, -1.0)  # what is gone stays gone
                mask = _part_way(part, step / steps).select(costs)
                weight = joint_update(W, mask, A, G, config.tolerance, config.iterations, weight)
        weights.append(weight)
        masks.append(mask)
    mask, weight = torch.cat(masks), torch.cat(weights)
    if problem.constraint.quantized:
        return on_support(problem, mask, weight, Refit("cg", iterations=0, damping=config.damping))
    return Solved(weight, None, mask, problem.error(weight, config.damping))
