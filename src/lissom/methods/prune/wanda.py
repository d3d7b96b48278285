"""Wanda: weights times the norm of their input, compared within each output row.

    score[r, c] = |W[r, c]| · ‖X_c‖₂

One forward pass, no update of the kept weights. With white inputs this is magnitude pruning by row.
Source: Sun, Liu, Bair, Kolter, ICLR 2024 (arXiv 2306.11695), eq. 1; methods/03 §5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import Problem, Solved


@dataclass(frozen=True)
class Wanda:
    """No settings of its own (the comparison group is the constraint's ``per``, default ``row``)."""


def wanda_score(problem: Problem, config: Wanda) -> Tensor:
    """(out, in)."""
    return problem.weight.abs() * problem.stats.norm


def wanda(problem: Problem, config: Wanda) -> Solved:
    """Keep the largest scores."""
    return problem.project(wanda_score(problem, config))
