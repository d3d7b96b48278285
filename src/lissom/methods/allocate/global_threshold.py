"""One threshold over all layers: each layer gets the sparsity that the solver's scores have below it.

    F_l(t)   share of layer l's scores below t, from its quantiles at j/64, straight lines between them
    s_l = min(F_l(t), most),   t such that Σ n_l s_l = S Σ n_l

In a model that streams by no pass sees all scores at once, so a first pass over the dense blocks keeps quantiles, and the layer
is then pruned to its own budget: the same zeros as from one sort of all scores, but for the straight lines (below half a
percent of a layer's weights). Where weights go in units, a unit's score is its mean, so that units of unequal size compete by
cost per weight. Budgets are as comparable between layers as the scores of the method are: Wanda's or a raw Hessian's grow
with the size of the activations, LLM Surgeon's and OBD's are losses of the model.
A recipe step with ``per: global`` has this allocation before it.
Source: global magnitude pruning (Han et al. 2015, arXiv 1506.02626); LLM Surgeon's threshold (arXiv 2312.17244); methods/03 §0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core import Budget, LayerSummary, Problem, Sparse
from .budget import meet

_LEVELS = np.linspace(0, 1, 65)


@dataclass(frozen=True)
class GlobalThreshold:
    """``most``: no layer loses more than this share of its weights."""

    most: float = 0.98


def summarise(problems: Sequence[Problem], target: float, config: GlobalThreshold) -> list[dict[str, float]]:
    """Quantiles of each layer's scores, keys ``quantile 0`` … ``quantile 64``."""
    out = []
    for problem in problems:
        score = problem.extra("score", "global-threshold")
        for rows, part in problem.constraint.slices():
            units = part.pattern.units(score[rows]) if isinstance(part.pattern, Sparse) else score[rows]
            size = score[rows].numel() / units.numel()
            values = np.quantile(units.double().cpu().numpy().ravel() / size, _LEVELS)
            out.append({f"quantile {j}": float(f"{v:.7g}") for j, v in enumerate(values)})
    return out


def share_below(quantiles: np.ndarray, threshold: float) -> np.ndarray:
    """F_l(t) of each row of ``quantiles: (layers, 65)``."""
    return np.array([np.interp(threshold, q, _LEVELS) for q in quantiles])


def global_threshold(layers: Sequence[LayerSummary], target: float, config: GlobalThreshold) -> Budget:
    """Bisection on the threshold; the last rounding error is shared out evenly."""
    q = np.array([[layer.values[f"quantile {j}"] for j in range(len(_LEVELS))] for layer in layers])
    sizes = np.array([layer.size for layer in layers], float)
    most = max(target, config.most)
    low, high = 0.0, float(q.max())
    for _ in range(200):
        middle = (low + high) / 2
        share = float((np.minimum(share_below(q, middle), most) * sizes).sum() / sizes.sum())
        low, high = (middle, high) if share < target else (low, middle)
    wanted = np.minimum(share_below(q, (low + high) / 2), most)
    values = meet(wanted.tolist(), sizes.astype(int).tolist(), target, 0.0, most)
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
