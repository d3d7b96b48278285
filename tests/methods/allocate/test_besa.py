"""BESA on a small block: masks are Wanda's, the best rates of a grid search are found, the error is never above equal rates."""

import dataclasses

import numpy as np
import pytest
import torch

from lissom.core import BlockProblem, LayerSummary, Solved, Sparse, Stats
from lissom.methods.allocate.besa import BESA, Sorted, besa, block_error, learn

WIDTH, SAMPLES = 24, 6


def block(gain=4.0, seed=0, broken=False):
    """h + tanh(h Aᵀ) Bᵀ + gain · h Cᵀ: layer c matters ``gain`` times as much as it looks."""
    g = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(WIDTH, WIDTH, generator=g) * WIDTH**-0.5 for n in "abc"}
    mix = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=g)
    hidden = [torch.randn(3, 20, WIDTH, generator=g) @ mix for _ in range(SAMPLES // 3)]

    def forward(w, h):
        w = weights | dict(w)
        return h + torch.tanh(h @ w["a"].T) @ w["b"].T + gain * h @ w["c"].T

    inner = torch.tanh(torch.cat(hidden) @ weights["a"].T)
    stats = {
        n: Stats.of(x, gram=False) for n, x in {"a": torch.cat(hidden), "b": inner, "c": torch.cat(hidden)}.items()
    }
    solved = {n: Solved(w, None, None, torch.zeros(WIDTH)) for n, w in weights.items()}
    return BlockProblem(solved, hidden, hidden, [forward({}, h) for h in hidden], forward, 0, stats)


def at(problem, rates):
    """The block's error with Wanda's masks by row, from the definition."""
    weights = {}
    for name, rate in rates.items():
        w = problem.solved[name].weight
        keep = Sparse(rate, "row").select(w.abs() * problem.stats[name].norm)
        weights[name] = torch.where(keep, w, 0.0)
    return block_error(problem, weights), weights


def test_rates_come_near_the_best_of_a_grid_search():
    problem, target = block(), 0.5
    steps = np.arange(0.3, 0.701, 1 / WIDTH)
    trials = [
        at(problem, {"a": a, "b": b, "c": 3 * target - a - b})[0]
        for a in steps for b in steps if 0.3 <= 3 * target - a - b <= 0.7
    ]  # fmt: skip
    best, equal = min(trials), at(problem, dict.fromkeys("abc", target))[0]
    solved = learn(problem, target, BESA(epochs=12))
    rates = {n: s.notes["rate"] for n, s in solved.items()}
    error, weights = at(problem, rates)
    assert all(torch.equal(solved[n].weight, weights[n]) for n in weights)  # Wanda's masks at those rates
    assert np.mean(list(rates.values())) == pytest.approx(target, abs=1e-9)
    assert rates["c"] < 0.4 < 0.5 < min(rates["a"], rates["b"])
    assert error < equal - 0.85 * (equal - best)
    energy = sum(float(t.square().sum()) for t in problem.targets)
    assert solved["a"].notes["block_error"] * energy == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.1, 5.0])
def test_the_error_is_never_above_equal_rates_and_budgets_are_exact(seed, rate):
    """Even with steps far too long."""
    problem = block(1.0, seed)
    solved = learn(problem, 0.6, BESA(epochs=2, rate=rate))
    notes = solved["a"].notes
    assert notes["block_error"] <= notes["block_error_equal"]
    layers = [LayerSummary(n, 0, "up", WIDTH, WIDTH, s.notes) for n, s in solved.items()]
    assert besa(layers, 0.6, BESA()).mean(layers) == pytest.approx(0.6, abs=1e-9)
    again = learn(problem, 0.6, BESA(epochs=2, rate=rate))
    assert all(torch.equal(again[n].weight, solved[n].weight) for n in solved)


def test_the_gradient_is_that_of_the_expected_mask():
    """For a loss linear in the mask, straight-through is exact: d/dβ of Σ w (1 − P(q))."""
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    layer, rates = Sorted.of(w, torch.ones(8)), torch.tensor([0.2, 0.45, 0.7])
    beta = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    layer.masked(beta, rates).sum().backward()
    for d, p in enumerate(rates):  # candidate d takes the weights below its rate
        taken = torch.stack([row.abs().argsort().argsort() for row in w]) + 0.5 < 8 * p
        assert float(beta.grad[d]) == pytest.approx(-float(w[taken].sum()), rel=1e-4)


def test_spread_zero_and_a_perfect_block_stay_equal():
    assert {s.notes["rate"] for s in learn(block(), 0.5, BESA(spread=0)).values()} == {0.5}
    still = dataclasses.replace(block(), forward=lambda w, h: h, targets=block().inputs)
    assert {s.notes["rate"] for s in learn(still, 0.5, BESA()).values()} == {0.5}
