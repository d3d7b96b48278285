"""Choose one option per layer so that the costs meet a budget and the losses add up to the least.

    minimise Σ_l loss_l(o_l)   subject to   Σ_l cost_l(o_l) ≤ budget

Each layer's options are reduced to their lower convex hull; walking all hulls together by falling loss saved per unit
of cost solves the Lagrangian relaxation min Σ loss + λ cost for every λ at once (Shoham & Gersho 1988; Everett 1963).
The walk stops at the first step that does not fit; the gap that is left, smaller than that step, is filled by the
single changes that still fit and save most (non-hull options included), and by exchanges of two layers' options.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...core import RecipeError


@dataclass(frozen=True)
class Option:
    """What a layer may become: ``cost`` in the budget's unit (bytes, or bits · weights), the ``loss`` that follows."""

    cost: float
    loss: float
    sparsity: float = 0.0
    bits: int = 16


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of (cost, loss), by rising cost and falling loss; the cheapest option is always in it."""
    points: list[Option] = []
    for o in sorted(options, key=lambda o: (o.cost, o.loss)):
        if points and o.loss >= points[-1].loss:
            continue
        while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-1], o):
            points.pop()  # the middle one saves less per cost than going straight on
        points.append(o)
    return points


def _slope(a: Option, b: Option) -> float:
    """Loss saved per unit of cost from a to b."""
    return (a.loss - b.loss) / max(b.cost - a.cost, 1e-30)


def spend(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option per layer, Σ cost ≤ ``budget``.

    Raises :class:`RecipeError` when even the cheapest options cost more, and says what they cost.
    """
    hulls = {name: hull(o) for name, o in options.items()}
    chosen = {name: h[0] for name, h in hulls.items()}
    left = budget - sum(o.cost for o in chosen.values())
    if left < -1e-9 * abs(budget):
        least = budget - left
        raise RecipeError(f"no choice of options costs as little as {budget:,.0f}: the cheapest is {least:,.0f}")
    steps = [(_slope(a, b), name, b) for name, h in hulls.items() for a, b in itertools.pairwise(h)]
    for _, name, option in sorted(steps, key=lambda s: -s[0]):  # stable: a hull's steps stay in order
        extra = option.cost - chosen[name].cost
        if extra > left:
            break
        chosen[name] = option
        left -= extra
    return _fill(options, chosen, left)


def reach(options: Mapping[str, Sequence[Option]], loss: float) -> dict[str, Option]:
    """The cheapest point of the walk over the hulls with Σ loss ≤ ``loss``.

    Raises :class:`RecipeError` when the dearest options lose more, and says what they lose.
    """
    hulls = {name: hull(o) for name, o in options.items()}
    chosen = {name: h[0] for name, h in hulls.items()}
    total = sum(o.loss for o in chosen.values())
    steps = [(_slope(a, b), name, b) for name, h in hulls.items() for a, b in itertools.pairwise(h)]
    for _, name, option in sorted(steps, key=lambda s: -s[0]):
        if total <= loss:
            break
        total += option.loss - chosen[name].loss
        chosen[name] = option
    if total > loss * (1 + 1e-9):
        raise RecipeError(f"no choice of options loses as little as {loss:.3g}: the best loses {total:.3g}")
    return chosen


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: float) -> dict[str, Option]:
    """Single changes and exchanges that lower the loss within what is left of the budget, best first."""
    names = list(options)
    for _ in range(10 * len(names)):
        ups = [  # every change of one layer
            (chosen[n].loss - o.loss, o.cost - chosen[n].cost, n, o) for n in names for o in options[n]
            if o is not chosen[n]
        ]  # fmt: skip
        single = max((u for u in ups if u[0] > 0 and u[1] <= left), key=lambda u: u[0], default=None)
        best, moves = (single[0], [single]) if single else (0.0, [])
        down = sorted((u for u in ups if u[1] < 0), key=lambda u: u[0] / u[1])[:64]
        up = sorted((u for u in ups if u[0] > 0), key=lambda u: -u[0])[:64]
        for a in up:
            for b in down:
                if a[2] != b[2] and a[1] + b[1] <= left and a[0] + b[0] > best * (1 + 1e-9) + 1e-30:
                    best, moves = a[0] + b[0], [a, b]
        if not moves:
            break
        for _, cost, name, option in moves:
            chosen[name] = option
            left -= cost
    return chosen


def plan_size(options: Mapping[str, Sequence[Option]], target: float, tolerance: float = 0.01) -> dict[str, Option]:
    """Sparsity and bits of every layer, meeting ``target`` bytes within ``tolerance`` (or staying at the best there is).

    ``options[name]``: measured losses and the bytes that the file would hold. Raises when the target lies outside of
    what the options span, and says the nearest that can be met.
    """
    low = sum(min(o.cost for o in os) for os in options.values())
    high = sum(max(o.cost for o in os) for os in options.values())
    if not low * (1 - tolerance) <= target <= high * (1 + tolerance):
        nearest = low if target < low else high
        raise RecipeError(
            f"a size of {target:,.0f} bytes cannot be met: these layers take {low:,.0f} to {high:,.0f} bytes; "
            f"the nearest possible target is {nearest:,.0f}"
        )
    chosen = spend(options, max(target, low))
    size = sum(o.cost for o in chosen.values())
    if size >= target * (1 - tolerance):
        return chosen
    # a better option may be smaller (an outlying loss curve); money that buys nothing is still spent down to tolerance
    for name in sorted(chosen, key=lambda n: chosen[n].cost):
        for option in sorted(options[name], key=lambda o: o.loss):
            extra = option.cost - chosen[name].cost
            if 0 < extra <= target - size and option.loss <= chosen[name].loss:
                chosen[name], size = option, size + extra
    return chosen
