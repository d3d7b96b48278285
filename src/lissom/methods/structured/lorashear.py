"""LoRAShear: low-rank updates train while redundant units shrink, and a half-space decides when a unit is gone.

    x_u:   all weights W + (α/r) B A of unit u, multiplied by a factor that shrinks step by step
    trial: x_u after the optimiser's step and the next shrinking
    ⟨trial, x_u⟩ < ε ‖x_u‖²   ⇒   x_u = 0 for good               (half-space projection)

Redundant are the units with the smallest |Σ w g| (first-order change of the loss); they shrink in ``periods`` groups, the
least important first, so that what they knew moves to the others while all still train. Source: Chen et al. 2023
(arXiv 2310.18356), LHSPG, and its optimiser DHSPG (arXiv 2305.15030); methods/03 §28. Differs: saliency instead of removing
each group once to find those that must stay; the same number in every block. Its dynamic recovery is the step ``heal``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .gate_settings import UnitTraining


@dataclass(frozen=True)
class LoRAShear(UnitTraining):
    """``periods``: groups of redundant units. ``epsilon`` of the half-space, in [0, 1). See :class:`UnitTraining`."""

    weights: Literal["all", "lora", "frozen"] = "lora"
    learning_rate: float = 5e-4
    periods: int = 4
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon < 1 or not 1 <= self.periods <= self.steps or self.weights != "lora":
            raise ValueError('epsilon must be in [0, 1), periods 1 … steps, and weights "lora"')


def lorashear(before: Tensor, trial: Tensor, config: LoRAShear) -> Tensor:
    """Units that the step sends to zero, (units,) bool; ``before``, ``trial``: (units, entries)."""
    return (before * trial).sum(1) < config.epsilon * before.square().sum(1)


def factor(rank: Tensor, progress: float, config: LoRAShear) -> Tensor:
    """What a redundant unit is multiplied by at ``progress``: 1 before its period, then linearly to 0 at the period's end.

    ``rank`` (redundant units,) in [0, 1): the order in which they go. The periods fill the share ``ramp`` of the training.
    """
    period = (rank * config.periods).floor()
    at = progress / max(config.ramp, 1e-9) * config.periods
    return (1 - (at - period)).clamp(0, 1)
