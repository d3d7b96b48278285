"""Structured magnitude: units with the smallest weights go (baseline).

    score_u = Σ over the unit's entries of |w|^p, rows of the layers before and columns of the layer after

``norm`` 1 or 2. ``weighted`` divides each layer's entries by the layer's mean of |w|^p first, so that layers of another
scale count alike. Source: Li et al. 2017 (arXiv 1608.08710) for filters; groups as in LLM-Pruner (arXiv 2305.11627).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...core import UnitProblem
from .shares import Shares


@dataclass(frozen=True)
class StructuredMagnitude(Shares):
    """``norm``: 1 or 2; ``weighted``: each matrix divided by its mean first."""

    norm: Literal[1, 2] = 2
    weighted: bool = False


def structured_magnitude(problem: UnitProblem, config: StructuredMagnitude) -> Tensor:
    """Score of every unit, (units,)."""
    powers = {n: w.abs().pow(config.norm) for n, w in problem.weights.items()}
    if config.weighted:
        powers = {n: p / p.mean().clamp_min(1e-30) for n, p in powers.items()}
    return problem.units.reduce(powers)
