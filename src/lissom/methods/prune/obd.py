"""OBD and L-OBD: saliency from the diagonal of a Hessian, no compensation.

    obd     score = ½ F_rc w²       F_rc: the mean squared gradient of the loss (empirical Fisher), ``extras["fisher"]``
    l-obd   score = ½ H_cc w²       H = (2/tokens) Σ x xᵀ of the layer: the square of Wanda's score, compared over the layer

Sources: LeCun, Denker, Solla 1989 (NeurIPS 2), eq. 5; Dong, Chen, Pan 2017 (arXiv 1705.07565) for the layer-wise form;
methods/03 §3. Differs: OBD takes the Fisher for the exact second derivative, as all later work does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import Problem, Solved


@dataclass(frozen=True)
class OBD:
    """No settings of its own."""


@dataclass(frozen=True)
class LOBD:
    """No settings of its own."""


def obd_score(problem: Problem, config: OBD) -> Tensor:
    """½ F w², (out, in)."""
    return 0.5 * problem.extra("fisher", "obd") * problem.weight.square()


def obd(problem: Problem, config: OBD) -> Solved:
    """Keep the largest scores."""
    return problem.project(obd_score(problem, config))


def l_obd_score(problem: Problem, config: LOBD) -> Tensor:
    """½ H_cc w², (out, in)."""
    second = 2 * problem.stats.sumsq / max(problem.stats.count, 1)
    return 0.5 * second * problem.weight.square()


def l_obd(problem: Problem, config: LOBD) -> Solved:
    """Keep the largest scores."""
    return problem.project(l_obd_score(problem, config))
