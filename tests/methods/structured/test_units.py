"""Scores of units against naive loops; what the names of methods promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import Stats, UnitProblem, Units
from lissom.methods.structured.flap import FLAP, bias_of_removed, flap
from lissom.methods.structured.head_importance import HeadImportance, head_importance
from lissom.methods.structured.llm_pruner import LLMPruner, llm_pruner
from lissom.methods.structured.magnitude import StructuredMagnitude, structured_magnitude
from lissom.methods.structured.shortgpt import ShortGPT, influence, shortgpt
from lissom.methods.structured.surgeon_units import SurgeonUnits, surgeon_units, unit_costs


def _problem(seed=0, units=3, each=2, width=5, samples=4):
    """Units of ``each`` neurons: rows of `up`, columns of `down`."""
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(units * each).view(units, each)
    group = Units("neurons", {"up": index}, {"down": index}, 2 * each * width)
    weights = {
        "up": torch.randn(units * each, width, generator=g),
        "down": torch.randn(width, units * each, generator=g),
    }
    X = torch.randn(40, units * each, generator=g) * torch.rand(units * each, generator=g) + 1
    gradients = {n: torch.randn(samples, *w.shape, generator=g) for n, w in weights.items()}
    return UnitProblem(group, weights, {"down": Stats.of(X, gram=False)}, gradients), X


def _entries(problem, unit):
    """(layer, row, column) of everything that a unit takes away."""
    for c in problem.units.rows["up"][unit].tolist():
        yield from (("up", c, j) for j in range(problem.weights["up"].shape[1]))
    for c in problem.units.columns["down"][unit].tolist():
        yield from (("down", i, c) for i in range(problem.weights["down"].shape[0]))


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_magnitude_by_hand(norm, weighted):
    problem, _ = _problem()
    scale = {n: float(w.abs().pow(norm).mean()) if weighted else 1.0 for n, w in problem.weights.items()}
    expected = [
        sum(abs(float(problem.weights[n][i, j])) ** norm / scale[n] for n, i, j in _entries(problem, u))
        for u in range(3)
    ]
    found = structured_magnitude(problem, StructuredMagnitude(norm=norm, weighted=weighted))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduce", ["element", "vector"])
@pytest.mark.parametrize("order", ["first", "mixed"])
def test_llm_pruner_by_hand(reduce, order):
    problem, _ = _problem()
    expected = []
    for unit in range(3):
        terms = []
        for n, i, j in _entries(problem, unit):
            w, g = float(problem.weights[n][i, j]), problem.gradients[n][:, i, j].tolist()
            term = w * sum(g) / len(g)
            if order == "mixed":
                term -= 0.5 * w * w * sum(x * x for x in g) / len(g)
            terms.append(term)
        expected.append(abs(sum(terms)) if reduce == "vector" else sum(map(abs, terms)))
    found = llm_pruner(problem, LLMPruner(reduce=reduce, order=order))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_head_importance_is_the_derivative_of_the_gate():
    problem, X = _problem()
    W, target = problem.weights["down"], torch.randn(40, 5, generator=torch.Generator().manual_seed(9))
    gradients, gates = [], []
    for x, y in zip(X.split(10), target.split(10), strict=True):
        w, gate = W.clone().requires_grad_(), torch.ones(3, requires_grad=True)
        loss = ((x * gate.repeat_interleave(2)) @ w.T - y).square().mean()
        gw, gg = torch.autograd.grad(loss, [w, gate])
        gradients.append(gw)
        gates.append(gg)
    exact = UnitProblem(problem.units, problem.weights, {}, {"down": torch.stack(gradients)})
    expected = torch.stack(gates).abs().mean(0)
    assert torch.allclose(head_importance(exact, HeadImportance()), expected / expected.norm(), atol=1e-5)


def test_flap_by_hand():
    problem, X = _problem()
    expected = []
    for unit in range(3):
        total = 0.0
        for c in problem.units.columns["down"][unit].tolist():
            x = X[:, c].double()
            total += float((x - x.mean()).square().mean()) * float(problem.weights["down"][:, c].square().sum())
        expected.append(total)
    assert flap(problem, FLAP()).tolist() == pytest.approx(expected, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), kept=st.sets(st.integers(0, 2), min_size=1, max_size=2))
def test_the_bias_removes_the_mean_error_exactly(seed, kept):
    problem, X = _problem(seed)
    keep = torch.tensor(sorted(kept))
    W = problem.weights["down"]
    left = torch.zeros_like(W)
    columns = problem.units.columns["down"][keep].flatten()
    left[:, columns] = W[:, columns]
    error = (X @ left.T + bias_of_removed(problem, keep)["down"] - X @ W.T).mean(0)
    assert float(error.abs().max()) < 1e-4


def test_units_that_never_change_cost_nothing_under_flap():
    problem, X = _problem()
    X = X.clone()
    X[:, 2:4] = 7.0  # the second unit
    constant = UnitProblem(problem.units, problem.weights, {"down": Stats.of(X, gram=False)})
    scores = flap(constant, FLAP())
    assert int(scores.argmin()) == 1 and float(scores[1]) < 1e-3


def _least(W, A, G, columns):
    """min ½ tr(G Δ A Δᵀ) over weights on ``columns``, by the normal equations of all entries at once."""
    free = torch.zeros(W.shape, dtype=torch.bool)
    free[:, columns] = True
    free = free.flatten()
    H = torch.kron(G, A)  # of the entries of W, row by row
    w = W.flatten()
    delta = torch.zeros_like(w)
    delta[~free] = -w[~free]
    delta[free] = torch.linalg.solve(H[free][:, free], -(H[free][:, ~free] @ delta[~free]))
    return float(0.5 * delta @ H @ delta), (w + delta).view_as(W)


def _curved(seed=0):
    problem, X = _problem(seed, units=4)
    g = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed + 1))
    return UnitProblem(problem.units, problem.weights, {"down": Stats.of(X)}, {}, {"down": g.T @ g / 30}), X


@pytest.mark.parametrize("seed", [0, 1])
def test_a_surgeon_s_costs_are_what_the_whole_quadratic_form_says(seed):
    problem, X = _curved(seed)
    W, index = problem.weights["down"].double(), problem.units.columns["down"]
    A = (X.double().T @ X.double()) / 40
    A = A + 0.01 * A.diagonal().mean() * torch.eye(8)
    G = problem.output_grams["down"].double() + 0.1 * problem.output_grams["down"].diagonal().mean() * torch.eye(5)
    left = torch.tensor([0, 2, 3])  # unit 1 is gone already
    before, _ = _least(W, A, G, index[left].flatten())
    expected = [_least(W, A, G, index[left[left != u]].flatten())[0] - before for u in left]
    assert unit_costs(W @ A, A, G, index[left]).tolist() == pytest.approx(expected, rel=1e-8)
    kept = torch.tensor([0, 3])
    repaired = SurgeonUnits().repair(problem, kept)["down.weight"].double()
    assert torch.allclose(repaired, _least(W, A, G, index[kept].flatten())[1], atol=1e-4)
    assert not SurgeonUnits(update=False).repair(problem, kept)


def test_units_go_one_by_one_where_rounds_allow_and_what_others_can_replace_goes_first():
    problem, X = _curved()
    index = problem.units.columns["down"]
    X[:, index[2]] = X[:, index[0]] + X[:, index[3]]  # says nothing of its own
    problem = UnitProblem(problem.units, problem.weights, {"down": Stats.of(X)}, {}, problem.output_grams)
    scores = surgeon_units(problem, SurgeonUnits(rounds=4, damping=1e-5))
    first = int(scores.argmin())
    assert first in (0, 2, 3) and float(scores[first]) < 1e-3 * float(scores.sort().values[1])
    keep = torch.tensor([u for u in range(4) if u != first])
    new = SurgeonUnits(damping=1e-5).repair(problem, keep)["down.weight"]
    assert torch.allclose(X @ new.T, X @ problem.weights["down"].T, atol=1e-2)
    left, order = torch.arange(4), []
    W, A = problem.weights["down"], X.T @ X / 40
    A = A + 1e-5 * A.diagonal().mean() * torch.eye(8)
    G = problem.output_grams["down"] + 0.1 * problem.output_grams["down"].diagonal().mean() * torch.eye(5)
    while len(left):
        u = int(unit_costs(W @ A, A, G, index[left]).argmin())
        order.append(int(left[u]))
        left = left[left != left[u]]
    assert scores.argsort().tolist() == order


def test_block_influence_and_the_choice_of_blocks():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert influence(x, x) == pytest.approx(0) and influence(x, -x) == pytest.approx(2)
    assert influence(x, y) == pytest.approx(1 - (1 + math.sqrt(0.5)) / 2)
    assert shortgpt([0.9, 0.1, 0.3, 0.2, 0.8], ShortGPT(0.6)) == [0, 2, 4]
    assert shortgpt([0.5, 0.5, 0.5], ShortGPT(0.67)) == [0, 1]
    assert shortgpt([0.5, 0.6], ShortGPT(0.01)) == [1]
