"""RIA: relative importance of a weight in its row and column, times the strength of its input.

    score[r, c] = (|W_rc| / Σ_r |W_rc|  +  |W_rc| / Σ_c |W_rc|) · ‖X_c‖₂^a

Dividing by row and column sums keeps every channel from being removed whole. Compared over the layer by default; no update
of the kept weights. For N:M patterns, :mod:`.permute` deals the inputs out so that each group mixes strong and weak ones.
Source: Zhang, Bai, Lin, Zhao, Hou, Cannistraci, ICLR 2024 ("Plug-and-Play", OpenReview Tr0lPx9woF), eq. 2–3; methods/03 §6.
Differs: in a stack, the column sums run over the rows of each layer alone, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Problem, Solved


@dataclass(frozen=True)
class RIA:
    """``power``: a, how much the input's norm counts."""

    power: float = 0.5


def ria_score(weight: Tensor, norm: Tensor, power: float) -> Tensor:
    """(out, in) of one layer; ``norm``: (in,)."""
    A = weight.abs()
    rows, columns = A.sum(1, keepdim=True), A.sum(0, keepdim=True)
    return (A / rows.clamp_min(1e-30) + A / columns.clamp_min(1e-30)) * norm.pow(power)


def ria_scores(problem: Problem, config: RIA) -> Tensor:
    """(out, in) of a stack."""
    scores = [
        ria_score(problem.weight[rows], problem.stats.norm, config.power) for rows, _ in problem.constraint.slices()
    ]
    return torch.cat(scores)


def ria(problem: Problem, config: RIA) -> Solved:
    """Keep the largest scores of each layer."""
    return problem.project(ria_scores(problem, config))
