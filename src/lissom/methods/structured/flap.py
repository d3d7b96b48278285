"""FLAP: units whose outputs fluctuate least go, and their mean output stays as a bias.

    score_c = Var(x_c) · ‖W_:c‖²        columns c of the attention's and the MLP's last layer, summed over a unit
    b       = Σ over removed c of E[x_c] · W_:c

A unit that always gives the same output is replaced by its mean without any error. Scores of attention are squared before
they are compared, as the reference code does. Source: An et al., AAAI 2024 (arXiv 2312.11983), "WIFV"; methods/03 §26.
Differs: the same number of units remains in every block, so that transformers loads the result (the paper compares
standardised scores over all blocks and leaves widths that differ). One forward pass; no training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import UnitProblem
from .shares import Widths


@dataclass(frozen=True)
class FLAP(Widths):
    """``bias``: compensate where the architecture can hold a bias."""

    bias: bool = True

    def repair(self, problem: UnitProblem, keep: Tensor) -> dict[str, Tensor]:
        return {f"{n}.bias": b for n, b in bias_of_removed(problem, keep).items()} if self.bias else {}


def flap(problem: UnitProblem, config: FLAP) -> Tensor:
    """Score of every unit, (units,)."""
    total = torch.zeros(problem.units.count)
    for name, index in problem.units.columns.items():
        score = problem.inputs[name].variance * problem.weights[name].square().sum(0)
        total += score[index].sum(1)
    return total.square() if problem.units.kind == "heads" else total


def bias_of_removed(problem: UnitProblem, keep: Tensor) -> dict[str, Tensor]:
    """Layer name → bias (out,) that gives the mean output of the units that are not in ``keep``."""
    gone = torch.ones(problem.units.count, dtype=torch.bool)
    gone[keep] = False
    out = {}
    for name, index in problem.units.columns.items():
        c = index[gone].flatten()
        out[name] = problem.weights[name][:, c] @ problem.inputs[name].mean[c]
    return out
