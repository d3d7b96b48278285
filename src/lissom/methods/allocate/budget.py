"""Shared arithmetic of allocations: clip, and meet the mean exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core import RecipeError


def meet(values: Sequence[float], sizes: Sequence[int], target: float, low: float, high: float) -> list[float]:
    """Shift ``values`` by one constant, clipped to [low, high], so that their size-weighted mean is ``target``.

    The clipped layers stay at their bound and the free ones carry the rest (water-filling); the shift is
    found by bisection, and the last rounding error is put on a free layer. Raises when the bounds exclude the target.
    """
    v, n = np.asarray(values, float), np.asarray(sizes, float)
    if not low <= target <= high:
        raise RecipeError(f"no budgets within [{low:g}, {high:g}] have the mean {target:g}")
    if np.ptp(v) == 0:
        return [target] * len(v)

    def mean(shift: float) -> float:
        return float((np.clip(v + shift, low, high) * n).sum() / n.sum())

    a, b = low - v.max() - 1, high - v.min() + 1
    for _ in range(200):
        mid = (a + b) / 2
        a, b = (mid, b) if mean(mid) < target else (a, mid)
    out = np.clip(v + (a + b) / 2, low, high)
    free = np.flatnonzero((out > low) & (out < high))
    if len(free):
        largest = free[np.argmax(n[free])]
        out[largest] += (target * n.sum() - (out * n).sum()) / n[largest]
    return [float(x) for x in out]


def bounds(target: float, below: float, above: float) -> tuple[float, float]:
    """``[max(0, S − below), min(0.98, S + above)]``, never excluding the target itself."""
    return max(0.0, target - below), max(target, min(0.98, target + above))


def chosen(spread: float | str) -> float:
    """The spread as a number; "auto" must have been resolved on held-out text before."""
    if isinstance(spread, str):
        raise RecipeError("spread: auto is chosen by the pipeline on held-out text; give a number here")
    return spread
