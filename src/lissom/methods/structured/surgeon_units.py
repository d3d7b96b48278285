"""Surgeon's units: heads and neurons that cost least under Kronecker curvature go, and the layer behind them is solved again.

    cost_U = ½ tr( W_U ([A⁻¹]_UU)⁻¹ W_Uᵀ G )       W: the layer that reads the units, U: the columns of one of them
    update   W_K ← (W A)_K (A_KK)⁻¹                 K: the columns that remain; the exact minimum of tr(G Δ A Δᵀ), whatever G

with A = E[x xᵀ] of that layer's inputs and G = E[g gᵀ] of the gradients at its outputs. Removing a unit's columns makes the
rows that feed it superfluous, so those cost nothing more. Units go in ``rounds``, an equal number in each, and each
round's costs are of the weights as solved again after the one before. Source: LLM Surgeon's columns (van der Ouderaa et al.,
ICLR 2024, arXiv 2312.17244, eqs. 7–11), with its column of one weight widened to the columns of a unit; methods/03 §10.
Differs: the factors are taken once, from the dense model's gradients and the smaller model's inputs; rows of layers that
nothing can be cut from (those that write into the hidden state) stay. Costs a forward and a backward pass on the
calibration samples, a Gram matrix and some inversions for each block; no training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import UnitProblem, damped
from .shares import Widths


@dataclass(frozen=True)
class SurgeonUnits(Widths):
    """``rounds`` of choosing; ``damping`` of A and ``damping_out`` of G, fractions of their mean diagonals; ``update``: solve
    the layer behind again (without it only the choice is the surgeon's)."""

    rounds: int = 16
    damping: float = 0.01
    damping_out: float = 0.1
    update: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.damping <= 0 or self.damping_out < 0:
            raise ValueError("rounds must be at least 1, damping positive and damping_out not negative")

    def repair(self, problem: UnitProblem, keep: Tensor) -> dict[str, Tensor]:
        """The weight of the layer behind, (out, in), zero at what goes."""
        if not self.update:
            return {}
        out = {}
        for name, index in problem.units.columns.items():
            W, A = _layer(problem, name, self.damping)
            columns, new = index[keep].flatten(), torch.zeros_like(W)
            new[:, columns] = _solved(W, A, columns)
            out[f"{name}.weight"] = new
        return out


def surgeon_units(problem: UnitProblem, config: SurgeonUnits) -> Tensor:
    """Score of every unit, (units,): what its removal cost when its turn came, rising with the turn."""
    [(name, index)] = problem.units.columns.items()
    W, A = _layer(problem, name, config.damping)
    G, target = damped(problem.output_grams[name], config.damping_out)[0], W @ A
    count, left = len(index), torch.arange(len(index))
    turns, prices = [], []
    for r in range(1, config.rounds + 1):
        going = len(left) - round(count * (1 - r / config.rounds))
        if not going:
            continue
        costs = unit_costs(target, A, G, index[left])
        order = costs.argsort(stable=True)[:going]
        turns.append(left[order])
        prices.append(costs[order])
        left = left[torch.ones_like(left, dtype=torch.bool).index_fill(0, order, False)]
    rising = torch.cat(prices).clamp_min(0).cummax(0).values * (1 + 1e-6 * torch.arange(count))
    return torch.zeros(count).index_copy(0, torch.cat(turns), rising)


def unit_costs(target: Tensor, A: Tensor, G: Tensor, units: Tensor) -> Tensor:
    """By how much the least ½ tr(G Δ A Δᵀ) grows when one more of ``units`` (units, k) goes, columns of W (out, in) of which all
    others are gone already, (units,). ``target``: W A."""
    columns, (n, k) = units.flatten(), units.shape
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(A[columns][:, columns]))
    V = target[:, columns] @ inverse
    own = inverse.view(n, k, n, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [A⁻¹]_UU of each
    each = V.view(-1, n, k).permute(1, 2, 0)  # (n, k, out)
    products = each @ G @ each.mT
    return 0.5 * torch.linalg.solve(own, products).diagonal(dim1=1, dim2=2).sum(1)


def _layer(problem: UnitProblem, name: str, damping: float) -> tuple[Tensor, Tensor]:
    A, dead = damped(problem.inputs[name].hessian / 2, damping)
    return torch.where(dead, 0.0, problem.weights[name]), A


def _solved(W: Tensor, A: Tensor, columns: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(A[columns][:, columns])
    return torch.cholesky_solve((W @ A)[:, columns].T, factor).T
