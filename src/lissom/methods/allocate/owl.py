"""OWL: blocks with more outlier activations keep more weights.

    A[r, c] = |W[r, c]| · ‖X_c‖₂        D_b = 100 · mean(A > M · mean A)  over all linear layers of block b
    keep_b = 2λ (D_b − min D) / (max D − min D),  shifted so that the mean keeps 1 − S

Source: Yin et al., ICML 2024 (arXiv 2310.05175); methods/03 §13 (M = 5, λ = 0.08). The budgets' mean here is
weighted by size and exact; the reference takes the plain mean over blocks (the same when blocks are alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core import Budget, LayerSummary, Problem
from .budget import bounds, chosen, meet


@dataclass(frozen=True)
class OWL:
    """``outlier``: M, times the mean that counts as an outlier. ``spread``: λ; the full width is 2λ."""

    outlier: float = 5.0
    spread: float | Literal["auto"] = 0.08
    spreads: tuple[float, ...] = (0.0, 0.04, 0.08, 0.12)


def summarise(problems: Sequence[Problem], target: float, config: OWL) -> list[dict[str, float]]:
    """The block's outlier ratio (percent), the same for each of its layers."""
    scores = [(p, p.weight.abs() * p.stats.norm) for p in problems]
    size = sum(A.numel() for _, A in scores)
    mean = sum(float(A.sum(dtype=A.dtype)) for _, A in scores) / size
    ratio = 100 * sum(int((A > config.outlier * mean).sum()) for _, A in scores) / size
    return [{"outlier_ratio": ratio} for p in problems for _ in p.names]


def owl(layers: Sequence[LayerSummary], target: float, config: OWL) -> Budget:
    """Sparsity falls linearly with the block's outlier ratio."""
    spread = chosen(config.spread)
    ratios = [layer.values["outlier_ratio"] for layer in layers]
    low, high = min(ratios), max(ratios)
    width = (high - low) or 1.0
    wanted = [-2 * spread * (r - low) / width for r in ratios]
    bottom, top = bounds(target, 2 * spread, 2 * spread)
    values = meet(wanted, [layer.size for layer in layers], target, bottom, top)
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
