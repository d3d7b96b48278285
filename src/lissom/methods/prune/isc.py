"""ISC: the sum of the OBS and the OBD saliency chooses the zeros inside a SparseGPT sweep.

    score[r, c] = w² / (2 [H⁻¹]_cc)  +  ½ w² H_cc          [H⁻¹]_cc of the columns that are still free: U_cc²

Source: Shao, Liu, Xiao, Zeng, Wan, Qian, ICASSP 2024 (arXiv 2310.09499); methods/03 §8; the mixed allocation that belongs to it
is ``trace-steps``. ``obd`` = 0 is SparseGPT, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import Problem, Solved, damped, sweep


@dataclass(frozen=True)
class ISC:
    """``obd``: weight of the OBD term. ``damping``, ``block``: as in SparseGPT."""

    obd: float = 1.0
    damping: float = 0.01
    block: int = 128


def importance(problem: Problem, config: ISC) -> Tensor:
    """What w² is multiplied with, (in,)."""
    H, _ = damped(problem.stats.hessian, config.damping)
    return 1 / (2 * problem.factor(config.damping).diagonal.square()) + config.obd * H.diagonal() / 2


def isc_score(problem: Problem, config: ISC) -> Tensor:
    """The mixed score of the weights before the sweep, (out, in)."""
    return problem.weight.square() * importance(problem, config)


def isc(problem: Problem, config: ISC) -> Solved:
    """One sweep with the mixed score."""
    factor = problem.factor(config.damping)
    if config.obd == 0:
        return sweep(problem, factor, config.block)
    return sweep(problem, factor, config.block, importance=importance(problem, config))
