"""Head importance by gradient: how fast the loss changes when a head's gate begins to close.

    I_u = E over samples |∂L/∂ξ_u|,   ∂L/∂ξ_u = Σ over the unit's columns c of W_:c · ∂L/∂W_:c       at ξ = 1

because a gate on a unit's output is a factor on the columns that read it. Works for neurons too. Scores are divided by
their ℓ2 norm within the block. Source: Michel, Levy, Neubig, NeurIPS 2019 (arXiv 1905.10650), eq. 2; methods/03 §20.
Differs: all removals at once, the same number in every block (the paper removes 10% at a time over the whole model).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import UnitProblem
from .shares import Widths


@dataclass(frozen=True)
class HeadImportance(Widths):
    """Heads go by default, and all neurons stay."""

    keep_heads: float = 0.8
    keep_neurons: float = 1.0


def head_importance(problem: UnitProblem, config: HeadImportance) -> Tensor:
    """Score of every unit, (units,)."""
    total = torch.zeros(problem.units.count)
    for name, index in problem.units.columns.items():
        gate = (problem.gradients[name] * problem.weights[name]).sum(1)  # (samples, in)
        total += gate[:, index].sum(2).abs().mean(0)
    return total / total.norm().clamp_min(1e-30)
