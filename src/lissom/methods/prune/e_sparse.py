"""E-Sparse: weights times the information and the strength of their input.

    score[r, c] = |W_rc| · (IR_c + α ‖X_c‖₂)          IR_c = −Σ_k p_k ln p_k,  histogram of x_c with ``bins`` bins

Made for N:M patterns, together with the shuffles of :mod:`.permute` (global: zig-zag; local: swap). α → ∞ is Wanda's order.
Source: Li, Niu, Zhang, Liu, Zhu, Kang 2023 (arXiv 2310.15929), eq. 4–6; methods/03 §7.
Differs: the histogram needs the activations themselves. Where ``extras["entropy"]`` holds it (:func:`channel_entropy`) it is
used; otherwise it is taken from the statistics as for a Gaussian input, IR_c = ½ ln(2πe σ_c²) − ln(2 max|x_c| / bins), the
differential entropy on bins of that width. ‖X_c‖ is the root mean square, so that the balance does not hang on the
number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Problem, Solved, Stats


@dataclass(frozen=True)
class ESparse:
    """``alpha``: weight of the input's norm beside its entropy. ``bins`` of the histogram."""

    alpha: float = 1.0
    bins: int = 100


def channel_entropy(X: Tensor, bins: int = 100) -> Tensor:
    """Entropy in nats of each input's histogram over its own range, (in,); ``X: (tokens, in)``."""
    low, high = X.amin(0), X.amax(0)
    width = ((high - low) / bins).clamp_min(1e-30)
    index = ((X - low) / width).long().clamp_(0, bins - 1)
    counts = torch.zeros(X.shape[1], bins).scatter_add_(1, index.T, torch.ones_like(X.T))
    p = counts / len(X)
    return -(p * p.clamp_min(1e-30).log()).sum(1)


def gaussian_entropy(stats: Stats, bins: int) -> Tensor:
    """The same from mean, variance and largest |x|, as if inputs were Gaussian, (in,), at least 0."""
    width = (2 * stats.absmax / bins).clamp_min(1e-30)
    spread = 0.5 * torch.log(2 * math.pi * math.e * stats.variance.clamp_min(1e-30))
    return (spread - width.log()).clamp(0, math.log(bins))


def e_sparse(problem: Problem, config: ESparse) -> Solved:
    """Keep the largest scores."""
    stats = problem.stats
    entropy = problem.extras.get("entropy")
    if entropy is None:
        entropy = gaussian_entropy(stats, config.bins)
    rms = stats.norm / math.sqrt(max(stats.count, 1))
    return problem.project(problem.weight.abs() * (entropy + config.alpha * rms))
