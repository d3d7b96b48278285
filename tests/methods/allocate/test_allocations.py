"""Allocations: budgets meet the target exactly, spread 0 is uniform, harder layers keep more."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import Both, LayerSummary, Problem, RecipeError, Stack, Stats
from lissom.methods.allocate import METHODS
from lissom.methods.allocate.atp import ATP, atp
from lissom.methods.allocate.budget import meet
from lissom.methods.allocate.equal_marginal import EqualMarginal, equal_marginal
from lissom.methods.allocate.estimates import layer_losses
from lissom.methods.allocate.loss_clusters import LossClusters, equal_marginal_sparsity, kmeans_1d, loss_clusters
from lissom.methods.allocate.owl import OWL, owl, summarise


def layers(losses, sizes=None):
    return [
        LayerSummary(
            f"l{i}",
            i,
            "up",
            10 * (i + 1) if sizes is None else sizes[i],
            10,
            {"loss": x, "outlier_ratio": x, "share": 1.0},
        )
        for i, x in enumerate(losses)
    ]


losses_strategy = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(losses_strategy, st.floats(0.3, 0.9), st.floats(0, 0.3), st.sampled_from(["ladder", "marginal"]))
def test_the_mean_is_the_target_and_harder_layers_keep_more(losses, target, spread, kind):
    rows = layers(losses)
    config = LossClusters(clusters=4, spread=spread, map=kind)
    budgets = [
        loss_clusters(rows, target, config),
        equal_marginal(rows, target, EqualMarginal(spread=spread)),
        owl(rows, target, OWL(spread=spread)),
    ]
    order = np.argsort(losses, kind="stable")
    for budget in budgets:
        assert budget.mean(rows) == pytest.approx(target, abs=1e-9)
        s = [budget.values[f"l{i}"] for i in order]
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(s))


def test_spread_zero_and_one_cluster_are_uniform_bit_for_bit():
    rows = layers([1e-3, 2.0, 50.0])
    for config in (LossClusters(spread=0), LossClusters(clusters=1)):
        assert set(loss_clusters(rows, 0.7, config).values.values()) == {0.7}
    assert set(equal_marginal(rows, 0.7, EqualMarginal(spread=0)).values.values()) == {0.7}


def test_the_ladder_by_hand():
    rows = layers([1e-4, 1e-2, 1e0], sizes=[10, 10, 10])
    budget = loss_clusters(rows, 0.7, LossClusters(clusters=3, spread=0.2))
    assert [budget.values[f"l{i}"] for i in range(3)] == pytest.approx([0.8, 0.7, 0.6])
    assert [budget.cluster[f"l{i}"] for i in range(3)] == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5).map(lambda x: round(x, 2)), min_size=1, max_size=9), st.integers(1, 4))
def test_kmeans_is_optimal(x, k):
    """Against every way to cut the sorted values into k intervals."""

    def squares(parts):
        return sum(float(((p - p.mean()) ** 2).sum()) for p in parts if len(p))

    v = np.sort(np.asarray(x))
    groups = min(k, len(np.unique(v)))
    best = min(
        squares(np.split(v, list(cuts))) for cuts in itertools.combinations(range(1, len(v)), groups - 1)
    )  # fmt: skip
    labels = np.asarray(kmeans_1d(x, k))
    found = squares([np.asarray(x)[labels == c] for c in range(groups)])
    assert found == pytest.approx(best, abs=1e-9)
    centres = [np.mean(np.asarray(x)[labels == c]) for c in range(groups)]
    assert all(a <= b for a, b in itertools.pairwise(centres))


def test_equal_marginal_loss_is_equal():
    """ē t² is the same for all layers, t = Φ⁻¹((1+s)/2)."""
    from scipy.stats import norm

    e = [0.5, 1.0, 2.0]
    s = np.asarray(equal_marginal_sparsity(e, [1, 1, 1], 0.6))
    assert s.mean() == pytest.approx(0.6)
    assert np.ptp(np.asarray(e) * norm.ppf((1 + s) / 2) ** 2) < 1e-9


def test_water_filling_respects_bounds():
    values = meet([-1.0, 0.0, 0.1], [1, 1, 1], 0.7, 0.5, 0.85)
    assert values[0] == 0.5 and max(values) <= 0.85 and np.mean(values) == pytest.approx(0.7)
    with pytest.raises(RecipeError):
        meet([0.0, 1.0], [1, 1], 0.9, 0.0, 0.8)


def problem(scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, 32, generator=g) @ torch.randn(32, 32, generator=g)
    W = torch.cat([torch.randn(6, 32, generator=g), torch.randn(4, 32, generator=g) * scale])
    return Problem(W, Stats.of(X), Stack(((6, Both()), (4, Both()))), ("a", "b"))


def test_estimate_a_is_the_mean_score_and_scales_with_the_square():
    p = problem()
    d = p.factor().diagonal
    E = p.weight**2 / (2 * d**2)
    a, b = layer_losses([p], "A", "none", 0.7, 0.01)
    assert a == pytest.approx(float(E[:6].mean()), rel=1e-5) and b == pytest.approx(float(E[6:].mean()), rel=1e-5)
    assert layer_losses([problem(10.0)], "A", "none", 0.7, 0.01)[1] == pytest.approx(100 * b, rel=1e-4)
    relative = layer_losses([problem(10.0)], "A", "output-energy", 0.7, 0.01)[1]
    assert relative == pytest.approx(layer_losses([p], "A", "output-energy", 0.7, 0.01)[1], rel=1e-4)


def test_estimates_are_ordered():
    """Removing only the cheapest weights costs less than the mean suggests; the measured pass is between."""
    p = problem()
    A, B, C = (layer_losses([p], e, "none", 0.7, 0.01)[0] for e in ("A", "B", "C"))
    assert B < A and 0 < C < A


def test_owl_counts_outliers_over_the_whole_block():
    p, q = problem(), problem(seed=1)
    scores = torch.cat([(x.weight.abs() * x.stats.norm).flatten() for x in (p, q)])
    expected = 100 * float((scores > 5 * scores.mean()).float().mean())
    found = summarise([p, q], 0.7, OWL())
    assert len(found) == 4 and all(f["outlier_ratio"] == pytest.approx(expected) for f in found)


def test_propagation_adds_decades_to_early_blocks():
    rows = layers([1.0, 1.0, 1.0], sizes=[10] * 3)
    plain = loss_clusters(rows, 0.7, LossClusters(clusters=3, spread=0.2))
    grown = loss_clusters(rows, 0.7, LossClusters(clusters=3, spread=0.2, propagation=2.0))
    assert set(plain.values.values()) == {0.7}
    assert [grown.values[f"l{i}"] for i in range(3)] == pytest.approx([0.6, 0.7, 0.8])


def test_a_share_of_the_stream_counts_as_much_as_the_loss_itself():
    rows = layers([1.0, 1e-2, 1.0], sizes=[10] * 3)
    rows = [replace(r, values={**r.values, "share": s}) for r, s in zip(rows, (1e-2, 1.0, 1.0), strict=True)]
    weighed = loss_clusters(rows, 0.7, LossClusters(clusters=3, spread=0.2))
    assert (
        weighed.values["l0"] == pytest.approx(weighed.values["l1"])
        and weighed.values["l1"] > weighed.values["l2"] + 0.1
    )
    plain = loss_clusters(rows, 0.7, LossClusters(clusters=3, spread=0.2, normalize="output-energy"))
    assert plain.values["l0"] == pytest.approx(plain.values["l2"]) and plain.values["l1"] > plain.values["l2"] + 0.1
    assert equal_marginal(rows, 0.7, EqualMarginal(normalize="stream")).values["l0"] == pytest.approx(
        equal_marginal(rows, 0.7, EqualMarginal(normalize="stream")).values["l1"]
    )


def test_atp_by_hand():
    rows = layers([1.0] * 5, sizes=[10] * 5)
    budget = atp(rows, 0.7, ATP(spread=0.2))
    assert [budget.values[f"l{i}"] for i in range(5)] == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8])
    assert set(atp(rows, 0.7, ATP(spread=0)).values.values()) == {0.7}
    bent = atp(rows, 0.7, ATP(spread=0.2, power=0.5))
    assert bent.values["l1"] - bent.values["l0"] == pytest.approx(0.1) and bent.mean(rows) == pytest.approx(0.7)
    clipped = atp(rows, 0.7, ATP(spread=0.4, above=0.05))
    assert max(clipped.values.values()) <= 0.75 + 1e-12 and clipped.mean(rows) == pytest.approx(0.7)


def test_the_table_is_complete():
    assert {"uniform", "owl", "atp", "loss-clusters", "equal-marginal"} <= set(METHODS)
