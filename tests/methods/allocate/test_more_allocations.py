"""AlphaPruning, ISC's steps and N:M per layer: exact means, hand-computed cases, the right direction."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import LayerSummary, RecipeError
from lissom.methods.allocate import METHODS
from lissom.methods.allocate.alpha_pruning import AlphaPruning, alpha_pruning, hill, tail_exponent
from lissom.methods.allocate.budget import round_to_groups
from lissom.methods.allocate.nm_layers import NMLayers, nm_layers
from lissom.methods.allocate.trace_steps import TraceSteps, trace_steps


def layers(values, key, sizes=None, block=None):
    return [
        LayerSummary(
            f"l{i}", i if block is None else block, "up", 10 if sizes is None else sizes[i], 10, {key: v, "share": 1.0}
        )
        for i, v in enumerate(values)
    ]


def test_hill_by_hand_and_on_a_pareto_tail():
    assert hill(np.array([1.0, np.e, np.e**2]), 1.0) == pytest.approx(1 + 3 / 3)
    values = (1 - np.random.default_rng(0).random(200_000)) ** (-1 / 1.5)  # density exponent 2.5
    assert hill(values, 1.0) == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize("tail", ["peak", "median"])
def test_heavier_tails_have_smaller_exponents(tail):
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(120, 120, generator=g)).Q for _ in range(2))
    light, heavy = (U @ torch.diag(torch.rand(120, generator=g).add(0.05).pow(-p)) @ V.T for p in (0.3, 1.5))
    assert tail_exponent(heavy, tail) < tail_exponent(light, tail)
    assert tail_exponent(10 * heavy, tail) == pytest.approx(tail_exponent(heavy, tail), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1.1, 9), min_size=2, max_size=10), st.floats(0.3, 0.85), st.floats(0, 0.4))
def test_alpha_budgets_are_exact_and_rise_with_the_exponent(alphas, target, spread):
    rows = layers(alphas, "alpha", sizes=[3 + i for i in range(len(alphas))])
    budget = alpha_pruning(rows, target, AlphaPruning(spread=spread))
    assert budget.mean(rows) == pytest.approx(target, abs=1e-9)
    s = [budget.values[f"l{i}"] for i in np.argsort(alphas, kind="stable")]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(s))
    assert max(s) <= 0.98 + 1e-9


def test_alpha_by_hand():
    budget = alpha_pruning(layers([2.0, 3.0, 4.0], "alpha"), 0.5, AlphaPruning(spread=0.3))
    assert [budget.values[f"l{i}"] for i in range(3)] == pytest.approx([0.35, 0.5, 0.65])


def test_steps_by_rank_of_the_trace():
    rows = layers([1e-3, 5.0, 5.0, 1e6, 7.0], "trace")
    budget = trace_steps(rows, 0.7, TraceSteps(spread=0.09))
    values = [budget.values[f"l{i}"] for i in range(5)]
    assert budget.mean(rows) == pytest.approx(0.7, abs=1e-12)
    assert (
        np.diff([values[0], values[1], values[4], values[3]]) == pytest.approx([-0.06] * 3) and values[1] == values[2]
    )
    assert set(trace_steps(rows, 0.7, TraceSteps(spread=0)).values.values()) == {0.7}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 0.95), st.integers(1, 50)), min_size=1, max_size=14), st.sampled_from([8, 16, 32])
)
def test_rounding_to_groups_misses_by_half_a_step_of_the_smallest_free_layer_at_most(rows, m):
    sparsity, sizes = [s for s, _ in rows], [n for _, n in rows]
    target = float(np.average(sparsity, weights=sizes))
    kept = round_to_groups(sparsity, sizes, target, m)
    assert all(1 <= k <= m for k in kept)
    missed = abs(sum(n * k for n, k in zip(sizes, kept, strict=True)) - m * (1 - target) * sum(sizes))
    free = [n for n, k in zip(sizes, kept, strict=True) if 1 < k < m]
    assert not free or missed <= min(free) / 2 + 1e-6
    if len(set(sizes)) == 1 and all(m * (1 - s) >= 1 for s in sparsity):
        assert all(abs(k - m * (1 - s)) < 1 + 1e-6 for k, s in zip(kept, sparsity, strict=True))


def test_largest_remainder_by_hand():
    # keep 16·(1 − s): 4.9, 4.8, 4.7, 5.6 of 20 in all: one of the three small remainders stays down
    assert round_to_groups([1 - k / 16 for k in (4.9, 4.8, 4.7, 5.6)], [1] * 4, 1 - 5 / 16, 16) == [5, 5, 5, 5]
    assert round_to_groups([1 - k / 16 for k in (4.9, 4.2, 4.3, 5.6)], [1] * 4, 1 - 4.75 / 16, 16) == [5, 4, 4, 6]


def test_nm_layers_meets_the_target_and_follows_its_plan():
    rows = layers([1e-4, 1e-2, 1.0, 1e2], "loss")
    budget = nm_layers(rows, 0.75, NMLayers(m=16))
    plan = METHODS["loss-clusters"].run(rows, 0.75, METHODS["loss-clusters"].config())
    assert budget.mean(rows) == pytest.approx(0.75) and budget.cluster == plan.cluster
    for i in range(4):
        n = 16 * (1 - budget.values[f"l{i}"])
        assert n == round(n) and abs(budget.values[f"l{i}"] - plan.values[f"l{i}"]) < 1 / 16
    assert set(nm_layers(rows, 0.75, NMLayers(m=8, plan="uniform")).values.values()) == {0.75}
    with pytest.raises(RecipeError, match="choose a larger M"):
        nm_layers(rows, 0.95, NMLayers(m=8))
