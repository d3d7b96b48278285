"""Head gates: every head gets a hard-concrete gate, and open gates cost a constant.

    L = loss + λ Σ_h P(g_h ≠ 0)

λ decides how many heads close; those with the largest log α remain. Source: Voita et al., ACL 2019 (arXiv 1905.09418),
eq. 3; methods/03 §20. Differs: the same number of KV heads (with their query heads) remains in every block, ``keep_heads``,
whatever number λ has closed. Costs ``steps`` training steps of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import GateProblem
from .gate_settings import UnitTraining


@dataclass(frozen=True)
class HeadGates(UnitTraining):
    """``penalty``: λ, per head. See :class:`UnitTraining`."""

    keep_heads: float = 0.5
    keep_neurons: float = 1.0
    penalty: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty <= 0 or self.keep_neurons != 1:
            raise ValueError("penalty must be positive, and keep_neurons 1: only heads have gates here")


def head_gates(problem: GateProblem, config: HeadGates) -> Tensor:
    """P(g ≠ 0) of all heads, (heads,)."""
    return problem.open["heads"].flatten()
