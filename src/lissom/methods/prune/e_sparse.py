"""E-Sparse: weights times the information and the strength of their input.

    score[r, c] = |W_rc| · (IR_c + α ‖X_c‖₂)          IR_c = −Σ_k p_k ln p_k,  histogram of x_c with ``bins`` bins
                                                      ‖X_c‖₂ of one sequence of 2048 tokens, on average

Made for N:M patterns, together with the shuffles of :mod:`.permute` (global: zig-zag; local: swap). α → ∞ is Wanda's order.
Source: Li, Niu, Zhang, Liu, Zhu, Kang 2023 (arXiv 2310.15929), eq. 4–6; methods/03 §7.
The balance hangs on the length that ‖X_c‖ is taken over, which the paper does not state: ours is the 2048 tokens of one sequence in the
code of Wanda, whatever the calibration. With the root mean square of a token the entropy outweighs it, and inputs hardly count.
The pipeline passes the entropy
of the real histogram (``stats.entropy``); where statistics come without it, it is that of a Gaussian input,
IR_c = ½ ln(2πe σ_c²) − ln(2 max|x_c| / bins), the differential entropy on bins of that width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Problem, Solved, Stats

SEQUENCE = 2048


@dataclass(frozen=True)
class ESparse:
    """``alpha``: weight of the input's norm beside its entropy. ``bins`` of the histogram."""

    alpha: float = 1.0
    bins: int = 100


def gaussian_entropy(stats: Stats, bins: int) -> Tensor:
    """The same from mean, variance and largest |x|, as if inputs were Gaussian, (in,), at least 0."""
    width = (2 * stats.absmax / bins).clamp_min(1e-30)
    spread = 0.5 * torch.log(2 * math.pi * math.e * stats.variance.clamp_min(1e-30))
    return (spread - width.log()).clamp(0, math.log(bins))


def channel_weight(stats: Stats, config: ESparse) -> Tensor:
    """What |w| is multiplied with, (in,)."""
    entropy = gaussian_entropy(stats, config.bins) if stats.entropy is None else stats.entropy
    return entropy + config.alpha * stats.norm * math.sqrt(SEQUENCE / max(stats.count, 1))


def e_sparse_score(problem: Problem, config: ESparse) -> Tensor:
    """(out, in)."""
    return problem.weight.abs() * channel_weight(problem.stats, config)


def e_sparse(problem: Problem, config: ESparse) -> Solved:
    """Keep the largest scores."""
    return problem.project(e_sparse_score(problem, config))
