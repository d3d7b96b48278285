"""Round to nearest: every weight goes to the closest level of its group's grid.

No data is needed. Equals GPTQ with H = I. Zeros of an earlier pruning step stay exact.
Source: the baseline of every paper (``--nearest`` of IST-DASLab/gptq); methods/02 §1.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core import Problem, Solved


@dataclass(frozen=True)
class RTN:
    """No settings of its own."""


def rtn(problem: Problem, config: RTN) -> Solved:
    """Project onto the grid, starting from the step before when there is one."""
    start = problem.start.weight if problem.start is not None else problem.weight
    return problem.project(start.abs(), start)
