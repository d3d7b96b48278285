"""Shared arithmetic of allocations: clip, and meet the mean exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...core import Budget, LayerSummary, RecipeError


def meet(
    values: Sequence[float], sizes: Sequence[int], target: float, low: float | Sequence[float], high: float
) -> list[float]:
    """Shift ``values`` by one constant, clipped to [low, high], so that their size-weighted mean is ``target``.

    ``low`` may be of each layer.

    The clipped layers stay at their bound and the free ones carry the rest (water-filling); the shift is
    found by bisection, and the last rounding error is put on a free layer. Raises when the bounds exclude the target.
    """
    v, n = np.asarray(values, float), np.asarray(sizes, float)
    floor = np.broadcast_to(np.asarray(low, float), v.shape)
    least = float((floor * n).sum() / n.sum()) if np.ndim(low) else float(floor[0])
    if not least <= target <= high:
        raise RecipeError(f"no budgets within [{least:g}, {high:g}] have the mean {target:g}")
    if np.ptp(v) == 0 and bool((floor <= target).all()):
        return [target] * len(v)

    def mean(shift: float) -> float:
        return float((np.clip(v + shift, floor, high) * n).sum() / n.sum())

    a, b = float(floor.min()) - v.max() - 1, high - v.min() + 1
    for _ in range(200):
        mid = (a + b) / 2
        a, b = (mid, b) if mean(mid) < target else (a, mid)
    out = np.clip(v + (a + b) / 2, floor, high)
    free = np.flatnonzero((out > floor) & (out < high))
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


def round_to_groups(
    sparsity: Sequence[float], sizes: Sequence[int], target: float, m: int, most: Sequence[int] | None = None
) -> list[int]:
    """N of every layer by largest remainder; ``sizes``: weights per layer; ``most``: what each may keep.

    All are rounded down first; then, while the model keeps too little (or too much), the layer with the largest remainder, of
    those whose move brings the mean nearer to the target, keeps one more (or less) of every M. What is left is at most half
    a step of the smallest layer that is free to move; layers of one size are never further than one step from their
    plan, small layers beside large ones may be, to take up what the large ones leave.
    """
    wanted = [m * (1 - s) for s in sparsity]
    most = [m] * len(wanted) if most is None else most
    kept = [min(k, max(1, math.floor(w + 1e-9))) for w, k in zip(wanted, most, strict=True)]
    missing = m * (1 - target) * sum(sizes) - sum(n * k for n, k in zip(sizes, kept, strict=True))
    while True:
        step = 1 if missing > 0 else -1
        # a layer may move when that brings the mean nearer, within 1 … M
        open_ = [
            i for i, n in enumerate(sizes) if n < 2 * abs(missing) * (1 - 1e-12) and 1 <= kept[i] + step <= most[i]
        ]
        if not open_:
            return kept
        best = max(open_, key=lambda i: (step * (wanted[i] - kept[i]), sizes[i]))
        kept[best] += step
        missing -= step * sizes[best]


def at_least(budget: Budget, layers: Sequence[LayerSummary], target: float, floor: Budget) -> Budget:
    """The budget with no layer below ``floor``, the others shifted so that the mean is ``target`` again."""
    names, sizes = [layer.name for layer in layers], [layer.size for layer in layers]
    wanted, least = ([b.values[n] for n in names] for b in (budget, floor))
    high = max(0.98, *wanted, *least)
    target = max(target, float(np.average(least, weights=sizes)))
    values = meet([max(w, f) for w, f in zip(wanted, least, strict=True)], sizes, target, least, high)
    return replace(budget, values=dict(zip(names, values, strict=True)))


def in_groups(
    budget: Budget, layers: Sequence[LayerSummary], target: float, m: int, floor: Budget | None = None
) -> Budget:
    """The budget with every layer's sparsity a multiple of 1/M, so that it is N of M. Raises where M leaves no room."""
    if not 2 <= m <= 32 or target > 1 - 1 / m:
        raise RecipeError(
            f"N of M: M = {m} must be 2 to 32 and leave one of {m} at sparsity {target:g}; choose a larger M"
        )
    sizes = [layer.size for layer in layers]
    most = None if floor is None else [round(m * (1 - floor.values[layer.name])) for layer in layers]
    kept = round_to_groups([budget.values[layer.name] for layer in layers], sizes, target, m, most)
    return replace(budget, values={layer.name: 1 - k / m for layer, k in zip(layers, kept, strict=True)})
