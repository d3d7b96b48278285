"""AlphaPruning: blocks whose weights have light-tailed spectra are pruned more.

    eigenvalues λ of W Wᵀ:     α = 1 + n / Σ_i ln(λ_i / λ_min)     over the n eigenvalues ≥ λ_min (Hill's estimator)
    λ_min   ``peak``: near the peak of the histogram of log10 λ, of those in [0.95, 1.5] × peak (in log10 units of the
            histogram's bins) the one with the smallest Kolmogorov-Smirnov distance; ``median``: the median
    s_b     linear in the block's mean α from 1 − ε (smallest α) to 1 + ε (largest), scaled to the budget

Needs no data: spectra of the weights alone. Heavy tails (small α) mark well-trained blocks.
Source: Lu, Zhou, Liu, Wang, Mahoney, Yang, NeurIPS 2024 (arXiv 2410.10912), eqs. 2–4; methods/03 §14 (ε = 0.3, 100 bins).
Differs: the mean over layers is weighted by size, bounded to [0, 0.98], and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...core import Budget, LayerSummary, Problem
from .budget import meet


@dataclass(frozen=True)
class AlphaPruning:
    """``spread``: ε. ``tail``: where the tail begins. ``bins`` of the histogram."""

    spread: float = 0.3
    tail: Literal["peak", "median"] = "peak"
    bins: int = 100


def hill(values: np.ndarray, start: float) -> float:
    """Hill's exponent of the values not below ``start`` (> 0)."""
    top = values[values >= start]
    return 1 + len(top) / max(float(np.log(top / start).sum()), 1e-12)


def tail_exponent(W: Tensor, tail: str = "peak", bins: int = 100) -> float:
    """α of the eigenvalues of W Wᵀ, ``W: (out, in)``."""
    values = np.sort(torch.linalg.svdvals(W.float()).square().double().cpu().numpy())
    values = values[values > 1e-12 * values[-1]] if values[-1] > 0 else values
    if len(values) < 3:
        return 1.0
    if tail == "median":
        return hill(values, float(values[len(values) // 2]))
    counts, edges = np.histogram(np.log10(values), bins)
    peak = 10 ** edges[counts.argmax()]
    best, distance = None, np.inf
    for start in values[(values >= 0.95 * peak) & (values <= 1.5 * peak)]:
        top = values[values >= start]
        if len(top) < 3:
            break
        alpha = hill(values, float(start))
        model = 1 - (top / start) ** (1 - alpha)
        ks = float(np.abs(model - np.arange(len(top)) / len(top)).max())
        if ks < distance:
            best, distance = alpha, ks
    return hill(values, float(peak)) if best is None else best


def summarise(problems: Sequence[Problem], target: float, config: AlphaPruning) -> list[dict[str, float]]:
    """The mean exponent of the block, the same for each of its layers."""
    alphas = [tail_exponent(p.weight[r], config.tail, config.bins) for p in problems for r, _ in p.constraint.slices()]
    return [{"alpha": float(np.mean(alphas))}] * len(alphas)


def alpha_pruning(layers: Sequence[LayerSummary], target: float, config: AlphaPruning) -> Budget:
    """Sparsity rises linearly with the block's exponent."""
    alphas = np.array([layer.values["alpha"] for layer in layers])
    sizes = np.array([layer.size for layer in layers])
    width = np.ptp(alphas)
    if config.spread == 0 or width == 0:
        values = [target] * len(layers)
    else:
        relative = 1 + config.spread * (2 * (alphas - alphas.min()) / width - 1)
        scaled = relative * target * sizes.sum() / (relative * sizes).sum()
        values = meet([float(v) for v in scaled], sizes.tolist(), target, 0.0, max(target, 0.98))
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
