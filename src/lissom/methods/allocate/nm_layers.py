"""N of M per layer: another allocation's budgets, rounded so that every layer has a pattern a kernel can use.

    N_l = M (1 − s_l) rounded up or down, 1 ≤ N_l ≤ M; budgets 1 − N_l / M

Rounding goes by largest remainder: all down first, then, while the model keeps too little (or too much), the layer with the
largest remainder, of those whose move brings the mean nearer to the target, keeps one more (or less) of every M. What is
left is at most half a step of the smallest layer that is free to move; layers of one size are never further than one step
from their plan, small layers beside large ones may be, to take up what the large ones leave.
Use it with a recipe step ``pattern: "n:16"``. Ours; the real-valued plan is any other allocation (``plan``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core import Budget, LayerSummary, Problem, RecipeError
from . import alpha_pruning as alpha
from . import equal_marginal as marginal
from . import loss_clusters as clusters
from . import owl
from . import trace_steps as trace
from .uniform import Uniform, uniform

# name → default settings, summarise, run
_PLANS: dict[str, tuple[Any, Any, Any]] = {
    "uniform": (Uniform(), None, uniform),
    "loss-clusters": (clusters.LossClusters(), clusters.summarise, clusters.loss_clusters),
    "equal-marginal": (marginal.EqualMarginal(), marginal.summarise, marginal.equal_marginal),
    "owl": (owl.OWL(), owl.summarise, owl.owl),
    "alpha-pruning": (alpha.AlphaPruning(), alpha.summarise, alpha.alpha_pruning),
    "trace-steps": (trace.TraceSteps(), trace.summarise, trace.trace_steps),
}


@dataclass(frozen=True)
class NMLayers:
    """``m``: group size. ``plan``: where real-valued budgets come from, with that allocation's default settings."""

    m: int = 16
    plan: Literal["uniform", "loss-clusters", "equal-marginal", "owl", "alpha-pruning", "trace-steps"] = "loss-clusters"


def summarise(problems: Sequence[Problem], target: float, config: NMLayers) -> list[dict[str, float]]:
    """What the underlying plan asks for."""
    settings, gather, _ = _PLANS[config.plan]
    if gather is None:
        return [{} for p in problems for _ in p.constraint.parts]
    return gather(problems, target, settings)


def round_to_groups(sparsity: Sequence[float], sizes: Sequence[int], target: float, m: int) -> list[int]:
    """N of every layer by largest remainder; ``sizes``: weights per layer."""
    wanted = [m * (1 - s) for s in sparsity]
    kept = [min(m, max(1, math.floor(w + 1e-9))) for w in wanted]
    missing = m * (1 - target) * sum(sizes) - sum(n * k for n, k in zip(sizes, kept, strict=True))
    while True:
        step = 1 if missing > 0 else -1
        # a layer may move when that brings the mean nearer, within 1 … M
        open_ = [i for i, n in enumerate(sizes) if n < 2 * abs(missing) * (1 - 1e-12) and 1 <= kept[i] + step <= m]
        if not open_:
            return kept
        best = max(open_, key=lambda i: (step * (wanted[i] - kept[i]), sizes[i]))
        kept[best] += step
        missing -= step * sizes[best]


def nm_layers(layers: Sequence[LayerSummary], target: float, config: NMLayers) -> Budget:
    """Budgets that are multiples of 1/M."""
    if not 2 <= config.m <= 32 or target > 1 - 1 / config.m:
        raise RecipeError(
            f"nm-layers: {config.m} must be 2 to 32 and leave one of {config.m} at sparsity {target:g}; choose a larger m"
        )
    settings, _, run = _PLANS[config.plan]
    plan = run(layers, target, settings)
    names, sizes = [layer.name for layer in layers], [layer.size for layer in layers]
    kept = round_to_groups([plan.values[name] for name in names], sizes, target, config.m)
    return Budget("sparsity", {n: 1 - k / config.m for n, k in zip(names, kept, strict=True)}, plan.cluster)
