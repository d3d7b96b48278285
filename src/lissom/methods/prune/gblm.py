"""GBLM-Pruner: weights times their input's norm, plus weights times the norm of their gradient.

    score[r, c] = |W_rc| · ‖X_c‖₂ / √tokens  +  β |W_rc| · ‖G_rc‖_p          compared within each row

‖G‖_p runs over calibration samples (p = 1: sum of |g|, p = 2: √Σ g²), gathered outside: ``extras["gradient"]`` or
``extras["gradient_l1"]``, (out, in).
Source: Das, Ma, Shen 2023 (arXiv 2311.04902), eq. 5–6 and the reference ``gblm``; methods/03 §9.
Differs: the reference scales gradients by 100 before accumulating; that factor is ``beta``, applied after dividing G by its
mean over the layer times the mean input norm, so that one value suits models of any size and loss scale. ``activation`` off
leaves the gradient term alone. Constant G and β → 0 are Wanda.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Problem, Solved


@dataclass(frozen=True)
class GBLM:
    """``beta``: weight of the gradient term, both terms having equal means at 1. ``activation``: the first term. ``norm`` over
    samples: l1 or l2.
    """

    beta: float = 1.0
    activation: bool = True
    norm: Literal["l1", "l2"] = "l2"


def gblm_score(problem: Problem, config: GBLM) -> Tensor:
    """(out, in)."""
    norm = problem.stats.norm / max(problem.stats.count, 1) ** 0.5
    gradient = problem.extra("gradient" if config.norm == "l2" else "gradient_l1", "gblm")
    parts = []
    for rows, _ in problem.constraint.slices():
        G = gradient[rows]
        relative = G * (norm.mean() / G.mean().clamp_min(1e-30))
        weight = config.beta * relative + norm if config.activation else relative
        parts.append(problem.weight[rows].abs() * weight)
    return torch.cat(parts)


def gblm(problem: Problem, config: GBLM) -> Solved:
    """Keep the largest scores."""
    return problem.project(gblm_score(problem, config))
