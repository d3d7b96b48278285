"""LLM-Pruner: units whose removal changes the loss least, by a Taylor expansion in their weights.

    vector   |Σ w g|            one number for the unit as a whole
    element  Σ |w g|            ``order`` first
             Σ |w g − ½ w² F|   ``order`` mixed, F = mean over samples of g², the diagonal of the Fisher matrix

with g the gradient of the loss over all samples. Source: Ma, Fang, Wang, NeurIPS 2023 (arXiv 2305.11627), eq. 3–5;
methods/03 §27. Differs: the same number of units in every block; blocks to leave alone with ``ignore_first`` and
``ignore_last`` would give shapes that transformers does not load, so there are none. The paper's LoRA recovery is the
recipe step ``heal`` with a ``rank``. Costs a forward and a backward pass on the calibration samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...core import UnitProblem
from .shares import Shares


@dataclass(frozen=True)
class LLMPruner(Shares):
    """``reduce`` element|vector, ``order`` first|mixed."""

    reduce: Literal["element", "vector"] = "element"
    order: Literal["first", "mixed"] = "first"


def llm_pruner(problem: UnitProblem, config: LLMPruner) -> Tensor:
    """Score of every unit, (units,)."""
    terms = {}
    for name, G in problem.gradients.items():
        w = problem.weights[name]
        term = w * G.mean(0)
        if config.order == "mixed":
            term = term - 0.5 * w.square() * G.square().mean(0)
        terms[name] = term if config.reduce == "vector" else term.abs()
    return problem.units.reduce(terms).abs()
