"""L0: hard-concrete gates on heads and neurons, trained with the weights to an expected sparsity.

    z = clip(σ((log u − log(1 − u) + log α) / β) (ζ − γ) + γ, 0, 1)        u uniform;  β = 2/3, γ = −0.1, ζ = 1.1
    ŝ = 1 − Σ size · P(z ≠ 0) / Σ size,   P(z ≠ 0) = σ(log α − β log(−γ / ζ))
    max over λ, min over the rest:   loss + λ₁ (ŝ − t) + λ₂ (ŝ − t)²       t rises linearly to the target

One pair of multipliers for the whole model. Source: Louizos, Welling, Kingma, ICLR 2018 (arXiv 1712.01312); the Lagrangian:
Wang et al. 2020 (arXiv 1910.04732); methods/03 §11. Differs: the gates with the largest log α remain, the same number in
every block, with their value at test time multiplied into the weights. Costs ``steps`` training steps of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import GateProblem
from .gate_settings import UnitTraining, reached, remaining


@dataclass(frozen=True)
class L0(UnitTraining):
    """See :class:`UnitTraining`."""

    keep_heads: float = 0.8


def l0(problem: GateProblem, config: L0) -> Tensor:
    """ŝ − t, (1,)."""
    size = dict(problem.size)
    full = sum(size[k] * o.numel() for k, o in problem.open.items())
    wanted = sum(size[k] * o.numel() * problem.keep[k] for k, o in problem.open.items())
    sparsity = 1 - remaining(dict(problem.open), size) / full
    return (sparsity - reached(problem.progress, config.ramp) * (1 - wanted / full))[None]
