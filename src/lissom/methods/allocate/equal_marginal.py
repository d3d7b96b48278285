"""Equal marginal loss: every layer is pruned until one more weight would cost the same everywhere.

    for Gaussian weights the loss of pruning the smallest fraction s is ē φ(s) with dφ/ds = t², t = Φ⁻¹((1+s)/2)
    minimise Σ n_l ē_l^α φ(s_l) at fixed budget  ⇒  s_l = 2Φ(√(λ/ē_l^α)) − 1

α (``spread``) tempers it: 0 is uniform, 1 a single global threshold, which is degenerate when losses span decades.
The reference for the clusters' maps; methods/01 §2.5, map 2, without clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core import Budget, LayerSummary, Problem
from . import loss_clusters as clusters
from .budget import bounds, chosen, meet
from .estimates import Estimate, Normalize


@dataclass(frozen=True)
class EqualMarginal:
    """As :class:`.loss_clusters.LossClusters`, without clusters."""

    estimate: Estimate = "A"
    normalize: Normalize = "output-energy"
    spread: float | Literal["auto"] = 0.15
    below: float = 0.12
    above: float = 0.12
    damping: float = 0.01
    spreads: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.25)


def summarise(problems: Sequence[Problem], target: float, config: EqualMarginal) -> list[dict[str, float]]:
    """Loss per layer of one block."""
    losses = clusters.layer_losses(problems, config.estimate, config.normalize, target, config.damping)
    return [{"loss": loss} for loss in losses]


def equal_marginal(layers: Sequence[LayerSummary], target: float, config: EqualMarginal) -> Budget:
    """Budgets by layer."""
    spread = chosen(config.spread)
    sizes = [layer.size for layer in layers]
    if spread == 0:
        values = [target] * len(layers)
    else:
        losses = [(clusters.in_stream(layer, config.normalize) + 1e-30) ** spread for layer in layers]
        wanted = clusters.equal_marginal_sparsity(losses, sizes, target)
        low, high = bounds(target, config.below, config.above)
        values = meet(wanted, sizes, target, low, high)
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
