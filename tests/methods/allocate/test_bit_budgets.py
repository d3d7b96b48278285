"""Budgets of bits and bytes against brute force."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import Both, LayerSummary, Problem, RecipeError, Stack, Stats
from lissom.methods.allocate.bits import Bits, bits, summarise
from lissom.methods.allocate.spend import Option, hull, plan_size, spend


def _options(seed: int, layers: int, choices: int = 4) -> dict[str, list[Option]]:
    r = random.Random(seed)
    out = {}
    for i in range(layers):
        size, scale = r.choice([100, 300, 500]), 10 ** r.uniform(-2, 1)
        out[f"l{i}"] = [Option(size * b, scale * 4.0**-b * r.uniform(0.7, 1.3), bits=b) for b in (2, 3, 4, 8)[:choices]]
    return out


@given(st.integers(0, 10**6), st.floats(2.05, 7.9))
@settings(max_examples=40, deadline=None)
def test_spending_is_near_the_optimum_and_never_over(seed: int, mean: float) -> None:
    options = _options(seed, 4)
    budget = mean * sum(o[0].cost / 2 for o in options.values())
    chosen = spend(options, budget)
    assert sum(o.cost for o in chosen.values()) <= budget * (1 + 1e-9)
    loss = sum(o.loss for o in chosen.values())
    # the walk over the hulls is optimal for what it spends, and stops less than one step short of the budget
    step = max(b.cost - a.cost for o in options.values() for a, b in itertools.pairwise(hull(o)))
    costs = [(sum(o.cost for o in c), sum(o.loss for o in c)) for c in itertools.product(*options.values())]
    best = min((lost for cost, lost in costs if cost <= budget - step), default=float("inf"))
    assert loss <= best * (1 + 1e-9) + 1e-12


def test_spending_is_optimal_where_the_walk_ends() -> None:
    options = _options(3, 4)
    hulls = {n: hull(o) for n, o in options.items()}
    budget = sum(o[1].cost for o in hulls.values())
    chosen = spend(options, budget)
    used = sum(o.cost for o in chosen.values())
    best = min(sum(o.loss for o in c) for c in itertools.product(*options.values()) if sum(o.cost for o in c) <= used)
    assert sum(o.loss for o in chosen.values()) == pytest.approx(best, rel=0.05)


def test_hull_drops_what_is_never_best() -> None:
    points = [Option(1, 10), Option(2, 9.5), Option(3, 2), Option(4, 3), Option(5, 1)]
    assert [o.cost for o in hull(points)] == [1, 3, 5]


def test_size_is_met_within_one_percent_and_impossible_sizes_name_the_nearest() -> None:
    r = random.Random(0)
    options = {}
    for i in range(40):
        n = r.choice([20_000, 110_000, 330_000])
        options[f"l{i}"] = [
            Option(n * (1 - s) * b / 8 + (n / 8 if s else 0), r.uniform(0.5, 2) * (4.0 ** -b + s**3), s, b)
            for s in (0.0, 0.3, 0.5, 0.7) for b in (2, 3, 4, 8)
        ]  # fmt: skip
    low = sum(min(o.cost for o in os) for os in options.values())
    high = sum(max(o.cost for o in os) for os in options.values())
    for share in (0.1, 0.3, 0.6):
        target = low + share * (high - low)
        chosen = plan_size(options, target)
        assert abs(sum(o.cost for o in chosen.values()) / target - 1) <= 0.01
    uniform = {n: next(o for o in os if o.bits == 4 and o.sparsity == 0) for n, os in options.items()}
    size = sum(o.cost for o in uniform.values())
    assert sum(o.loss for o in plan_size(options, size).values()) <= sum(o.loss for o in uniform.values())
    with pytest.raises(RecipeError, match="nearest possible target"):
        plan_size(options, low / 2)
    with pytest.raises(RecipeError, match="cheapest"):
        spend(options, low / 2)


def test_bits_go_where_they_save_most() -> None:
    config = Bits(choices=(2, 3, 4, 8), group_size=16)
    torch.manual_seed(0)
    W = torch.randn(24, 32)
    W[12:, ::4] *= 20  # one scale for loud and quiet weights makes the second layer hard to quantize
    stack = Stack(((12, Both()), (12, Both())))
    problem = Problem(W, Stats.of(torch.randn(200, 32)), stack, ("easy", "hard"))
    curves = summarise([problem], 3.0, config)
    for curve in curves:
        losses = [curve[f"loss_{b}"] for b in (2, 3, 4, 8)]
        assert losses == sorted(losses, reverse=True) and losses[0] < 2
    layers = [
        LayerSummary(n, 0, "x", 12, 32, {"loss_2": c, "loss_3": c / 4, "loss_4": c / 16, "loss_8": 0})
        for n, c in (("a", 1.0), ("b", 9.0))
    ]
    budget = bits(layers, 3.0, config)
    assert budget.quantity == "bits" and budget.mean(layers) <= 3.0
    assert budget.values["b"] > budget.values["a"]
    with pytest.raises(RecipeError, match="choices"):
        bits(layers, 1.5, config)
