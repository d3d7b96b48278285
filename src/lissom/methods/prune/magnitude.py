"""Magnitude pruning: zero the smallest |w|. The baseline that everything else must beat.

    score = |W|          compared over the whole matrix (``per: layer``) or within each output row

No data is needed. When the constraint also holds a grid the kept weights are rounded to nearest.
Source: Gordon, Duh, Andrews 2020 (arXiv 2002.08307); methods/03 §1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import Problem, Solved


@dataclass(frozen=True)
class Magnitude:
    """No settings of its own."""


def magnitude_score(problem: Problem, config: Magnitude) -> Tensor:
    """(out, in)."""
    return problem.weight.abs()


def magnitude(problem: Problem, config: Magnitude) -> Solved:
    """Keep the largest |w| of each layer of the stack."""
    return problem.project(problem.weight.abs())
