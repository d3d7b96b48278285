"""SparseGPT: choose zeros by second-order loss and let the free columns absorb the error.

    score[r, c] = W[r, c]² / U_cc²        H⁻¹ = UᵀU
    error feedback as in :mod:`lissom.core.sweep`

The mask is chosen for each block of ``block`` columns over all rows of a layer (N:M: for each row every
M columns) on the weights as updated so far. With a grid in the constraint, zeroing and rounding happen
in the same sweep, so that the feedback covers both (the joint form of arXiv 2409.20094).
Source: Frantar & Alistarh, ICML 2023 (arXiv 2301.00774), algorithm 1; methods/01 §3, 03 §4.
Differs from the reference code: exact counts when scores tie; layers with the same input share one
factorisation and one sweep; grids see the weights as updated inside the block too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import Problem, Solved, sweep


@dataclass(frozen=True)
class SparseGPT:
    """``damping``: fraction of mean(diag H) added. ``block``: columns whose mask is chosen together."""

    damping: float = 0.01
    block: int = 128


def sparsegpt_score(problem: Problem, config: SparseGPT) -> Tensor:
    """½ w² / U_cc² of the weights before the sweep, (out, in): what removing one costs once the columns before it are gone."""
    return problem.weight.square() / (2 * problem.factor(config.damping).diagonal.square())


def sparsegpt(problem: Problem, config: SparseGPT) -> Solved:
    """One sweep from left to right."""
    return sweep(problem, problem.factor(config.damping), config.block)
