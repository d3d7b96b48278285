"""Predictor search on problems whose best plan is known, and what it promises on any."""

import numpy as np
import pytest

from lissom.core import LayerSummary
from lissom.methods.allocate.predictor_search import PredictorSearch, Space, held_out_tau, predictor_search

BLOCKS, ROLES = 12, {"q": 100, "up": 300, "down": 300}
LAYERS = [
    LayerSummary(f"{b}.{r}", b, r, size // 10, 10, {}) for b in range(BLOCKS) for r, size in ROLES.items()
]  # fmt: skip
SIZES = np.array([la.size for la in LAYERS])


def quadratic(cost):
    """Σ n c s² / Σ n: with Lagrange's multiplier, the best plan at mean S has s ∝ 1/c."""

    def measure(budget, layers, target, label):
        s = np.array([budget.values[la.name] for la in layers])
        calls.append(float((SIZES * cost * s**2).sum() / SIZES.sum()))
        return calls[-1]

    calls: list[float] = []
    inverse = 1 / cost
    best = 0.5 * inverse * SIZES.sum() / (SIZES * inverse).sum()
    return measure, calls, best


def costs():
    """Early blocks cost more, and ``down`` more than the others."""
    return np.array([(1.3 - 0.05 * la.block) * (1.25 if la.role == "down" else 1.0) for la in LAYERS])


def test_the_best_plan_of_a_known_problem_is_found():
    measure, calls, best = quadratic(costs())
    config = PredictorSearch(plans=60, search=4000, rounds=3, verify=6, spread=0.25)
    assert best.min() > 0.25 and best.max() < 0.75  # inside of what is searched
    budget = predictor_search(LAYERS, 0.5, config, measure)
    got = np.array([budget.values[la.name] for la in LAYERS])
    least = float((SIZES * costs() * best**2).sum() / SIZES.sum())
    told = budget.notes
    assert len(calls) == 60 + 3 * 6 == told["measured_plans"]
    assert told["best"] == min(calls) and told["uniform"] == calls[0]
    assert told["best"] < told["uniform"] - 0.6 * (told["uniform"] - least)
    assert told["best"] < min(told["sampled"])  # the predictor's plans are better than the samples
    assert np.corrcoef(got, best)[0, 1] > 0.75
    assert told["rounds"][0]["kendall_tau"] > 0.6 and "down" in list(told["rounds"][-1]["ranking"])[:6]


@pytest.mark.parametrize("granularity", ["block-role", "layer"])
def test_uniform_stays_where_it_is_the_best_and_budgets_are_exact(granularity):
    measure, calls, _ = quadratic(np.ones(len(LAYERS)))
    config = PredictorSearch(plans=12, search=500, rounds=1, verify=3, granularity=granularity)
    budget = predictor_search(LAYERS, 0.5, config, measure)
    assert set(budget.values.values()) == {0.5} and calls[0] == min(calls)
    space = Space(LAYERS, 0.5, config)
    for row in space.budgets(space.random(20, np.random.default_rng(1))):
        made = space.budget(row)
        assert made.mean(LAYERS) == pytest.approx(0.5, abs=1e-9)
        assert 0.3 - 1e-9 <= min(made.values.values()) and max(made.values.values()) <= 0.7 + 1e-9
        np.testing.assert_allclose(list(made.values.values()), row, atol=1e-6)


def test_the_result_is_never_worse_than_uniform_even_where_nothing_can_be_learned():
    rng = np.random.default_rng(0)
    calls = []

    def noise(budget, layers, target, label):
        calls.append(float(rng.normal()))
        return calls[-1]

    config = PredictorSearch(plans=20, search=300, rounds=1, verify=3)
    told = predictor_search(LAYERS, 0.6, config, noise).notes
    assert told["best"] == min(calls) <= told["uniform"]
    assert abs(told["rounds"][0]["kendall_tau"]) < 0.4  # and says so


def test_the_same_seed_gives_the_same_plan_and_another_one_another():
    config = PredictorSearch(plans=15, search=500, rounds=1, verify=2)
    measure = quadratic(costs())[0]
    first, again = (predictor_search(LAYERS, 0.5, config, measure) for _ in range(2))
    assert first == again
    other = predictor_search(LAYERS, 0.5, PredictorSearch(plans=15, search=500, rounds=1, verify=2, seed=1), measure)
    assert other.values != first.values


def test_tau_is_taken_on_plans_that_were_not_fitted():
    """Trees fit any noise on what they saw; a τ of the fit would be near 1."""
    rng = np.random.default_rng(0)
    X = rng.random((40, 5))
    assert abs(held_out_tau(X, rng.random(40), 0)) < 0.3
    assert held_out_tau(X, X[:, 0] + 0.01 * rng.random(40), 0) > 0.8


def test_spread_zero_measures_nothing():
    def never(*_):
        raise AssertionError

    assert set(predictor_search(LAYERS, 0.5, PredictorSearch(spread=0), never).values.values()) == {0.5}
