"""Layer-wise sparsity scheduler: layers are grouped by the logarithm of their pruning loss, groups share the budget.

    x_l = log10 ē_l + γ (1 − b_l/(B − 1))     ē_l: :mod:`.estimates`, ``stream`` by default; γ = ``propagation``
    K-means in one dimension, exact by dynamic programming; cluster 1 has the smallest loss
    ladder    u_k = (μ_k − μ_min)/(μ_max − μ_min),   s_l = S + λ (ū − u_k(l))      λ = ``spread``
    marginal  s_k = 2Φ(√(λ/ē_k^α)) − 1: equal marginal loss of Gaussian weights, α = ``spread``

A layer's own loss says nothing of what later blocks make of it. ``stream`` measures how much of what they read is this block's;
γ, in decades between first and last block, sets a growth with depth by hand. ``none`` and γ = 0: the published estimate. All maps meet Σ n_l s_l = S Σ n_l exactly after clipping. ``spread`` 0 is uniform, bit for bit.
Source: Zhang, Chen, He, Zhang 2024 (arXiv 2409.20094). Confirmed there: the mean loss from rows of the inverse
Hessian, K-means on its logarithm, groups share the budget. Ours: normalisations, K, both maps (methods/01 §2.4–2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core import Budget, LayerSummary, Problem
from .budget import bounds, chosen, meet
from .estimates import Estimate, Normalize, in_stream, layer_losses


@dataclass(frozen=True)
class LossClusters:
    """``estimate`` A|B|C, ``normalize`` none|output-energy|stream, ``clusters`` K, ``map`` ladder|marginal,
    ``spread`` λ (ladder: width between first and last group; marginal: α), ``granularity`` linear|block,
    ``propagation`` γ in decades,
    ``below``/``above``: budgets stay within [S − below, S + above].
    """

    estimate: Estimate = "A"
    normalize: Normalize = "stream"
    clusters: int = 8
    map: Literal["ladder", "marginal"] = "ladder"
    spread: float | Literal["auto"] = 0.25
    granularity: Literal["linear", "block"] = "linear"
    propagation: float = 0.0
    below: float = 0.35
    above: float = 0.22
    damping: float = 0.01
    spreads: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.25, 0.35)


def summarise(problems: Sequence[Problem], target: float, config: LossClusters) -> list[dict[str, float]]:
    """Loss per layer of one block (averaged over the block, weighted by size, when asked)."""
    losses = layer_losses(problems, config.estimate, config.normalize, target, config.damping)
    if config.granularity == "block":
        sizes = [rows * p.weight.shape[1] for p in problems for rows, _ in p.constraint.parts]
        losses = [float(np.average(losses, weights=sizes))] * len(losses)
    return [{"loss": loss} for loss in losses]


def kmeans_1d(x: Sequence[float], k: int) -> list[int]:
    """Labels 0 … k−1 by rising centroid; optimal within-cluster squares by dynamic programming, O(k n²)."""
    order = np.argsort(x, kind="stable")
    v = np.asarray(x, float)[order]
    n = len(v)
    k = min(k, len(np.unique(v)))
    s, q = np.concatenate([[0.0], v.cumsum()]), np.concatenate([[0.0], (v * v).cumsum()])

    def cost(i: int, j: int) -> float:  # of v[i:j]
        return max(0.0, q[j] - q[i] - (s[j] - s[i]) ** 2 / (j - i))

    best = np.full((k + 1, n + 1), np.inf)
    cut = np.zeros((k + 1, n + 1), int)
    best[0, 0] = 0.0
    for c in range(1, k + 1):
        for j in range(c, n + 1):
            trials = [best[c - 1, i] + cost(i, j) for i in range(c - 1, j)]
            cut[c, j] = int(np.argmin(trials)) + c - 1
            best[c, j] = trials[cut[c, j] - c + 1]
    labels, j = np.zeros(n, int), n
    for c in range(k, 0, -1):
        i = cut[c, j]
        labels[i:j] = c - 1
        j = i
    out = np.empty(n, int)
    out[order] = labels
    return [int(c) for c in out]


def equal_marginal_sparsity(loss: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """``s = 2Φ(√(λ/ē)) − 1`` with λ such that the weighted mean is ``target`` (bisection in log λ)."""
    from scipy.special import ndtr  # slow to import, and only needed here

    e, n = np.asarray(loss, float), np.asarray(sizes, float)

    def sparsity(log_lambda: float) -> np.ndarray:
        return 2 * ndtr(np.sqrt(np.exp(log_lambda) / e)) - 1

    a, b = np.log(e.min()) - 40, np.log(e.max()) + 40
    for _ in range(200):
        mid = (a + b) / 2
        a, b = (mid, b) if (sparsity(mid) * n).sum() / n.sum() < target else (a, mid)
    return [float(s) for s in sparsity((a + b) / 2)]


def loss_clusters(layers: Sequence[LayerSummary], target: float, config: LossClusters) -> Budget:
    """Budgets by cluster; clusters are numbered from 0 (smallest loss)."""
    spread = chosen(config.spread)
    last = max(1, *(layer.block for layer in layers), 1)
    x = [
        float(np.log10(in_stream(layer, config.normalize) + 1e-30)) + config.propagation * (1 - layer.block / last)
        for layer in layers
    ]
    sizes = [layer.size for layer in layers]
    labels = kmeans_1d(x, config.clusters)
    centres = [float(np.mean([xi for xi, c in zip(x, labels, strict=True) if c == k])) for k in range(max(labels) + 1)]
    if spread == 0 or len(centres) == 1:
        values = [target] * len(layers)
    else:
        if config.map == "ladder":
            width = centres[-1] - centres[0]
            wanted = [-spread * (centres[c] - centres[0]) / width for c in labels]
        else:
            wanted = equal_marginal_sparsity([10 ** (spread * centres[c]) for c in labels], sizes, target)
        low, high = bounds(target, config.below, config.above)
        values = meet(wanted, sizes, target, low, high)
    names = [layer.name for layer in layers]
    return Budget("sparsity", dict(zip(names, values, strict=True)), dict(zip(names, labels, strict=True)))
