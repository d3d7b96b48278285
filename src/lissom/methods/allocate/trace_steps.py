"""ISC's mixed sparsity: layers sorted by the trace of their Hessian, sparsity falls in equal steps.

    sensitivity of a layer: tr(H)/in, the mean of diag((2/tokens) Σ x xᵀ), exact instead of Hutchinson's estimate
    sorted from insensitive to sensitive, s runs in equal steps from S + α to S − α; size-weighted mean S

``granularity`` linear: every weight matrix has its place; block: the mean over a block's layers.
Source: Shao, Liu, Xiao, Zeng, Wan, Qian, ICASSP 2024 (arXiv 2310.09499); methods/03 §8 (α uncertain, 0.05–0.1).
Layers with equal traces (q, k, v: they share their input) share a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core import Budget, LayerSummary, Problem
from .budget import bounds, meet


@dataclass(frozen=True)
class TraceSteps:
    """``spread``: α. ``granularity``: see the module."""

    spread: float = 0.05
    granularity: Literal["linear", "block"] = "linear"


def summarise(problems: Sequence[Problem], target: float, config: TraceSteps) -> list[dict[str, float]]:
    """Mean diagonal of each layer's Hessian."""
    traces = [float(2 * p.stats.sumsq.mean() / max(p.stats.count, 1)) for p in problems for _ in p.constraint.parts]
    if config.granularity == "block":
        traces = [float(np.mean(traces))] * len(traces)
    return [{"trace": trace} for trace in traces]


def trace_steps(layers: Sequence[LayerSummary], target: float, config: TraceSteps) -> Budget:
    """Equal steps by rank of the trace."""
    traces = [layer.values["trace"] for layer in layers]
    places, rank = np.unique(traces, return_inverse=True)
    if config.spread == 0 or len(places) == 1:
        values = [target] * len(layers)
    else:
        wanted = config.spread * (1 - 2 * rank / (len(places) - 1))
        low, high = bounds(target, 2 * config.spread, 2 * config.spread)
        values = meet([float(w) for w in wanted], [layer.size for layer in layers], target, low, high)
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
