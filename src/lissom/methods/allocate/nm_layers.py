"""N of M per layer: another allocation's budgets, rounded so that every layer has a pattern a kernel can use.

    N_l = M (1 − s_l) rounded up or down, 1 ≤ N_l ≤ M; budgets 1 − N_l / M          (:func:`.budget.in_groups`)

Every allocation before a step with ``pattern: "n:16"`` is rounded so; this one does it whatever the step, with the default
settings of another allocation (``plan``). Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core import Budget, LayerSummary, Problem
from . import alpha_pruning as alpha
from . import equal_marginal as marginal
from . import loss_clusters as clusters
from . import owl
from . import trace_steps as trace
from .budget import in_groups
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


def nm_layers(layers: Sequence[LayerSummary], target: float, config: NMLayers) -> Budget:
    """Budgets that are multiples of 1/M."""
    settings, _, run = _PLANS[config.plan]
    return in_groups(run(layers, target, settings), layers, target, config.m)
