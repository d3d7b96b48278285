"""Block-wise reconstruction: legal weights stay legal, and a linear block reaches its least-squares optimum."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import NM, BlockProblem, Both, Grid, NumericalError, Problem, Solved, Sparse, Stats
from lissom.methods.heal.legal import Legal
from lissom.methods.heal.reconstruct import Reconstruct, _moved, rate, reconstruct, relative_error


def _solved(W, constraint):
    return Problem.of(W, Stats.empty(W.shape[1], gram=False), constraint).project(W.abs())


CONSTRAINTS = [
    Sparse(0.5),
    NM(2, 4),
    Grid(4, 8),
    Grid(3, None, True),
    Both(NM(2, 4), Grid(4, 8)),
    Both(Sparse(0.7), Grid(2, 16)),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_solved_weights_are_legal_as_they_are(constraint):
    solved = _solved(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), constraint)
    rule = Legal.of(solved)
    assert torch.allclose(rule.weight(solved.weight), solved.weight, atol=1e-6)
    again = rule.solved(solved.weight, solved)
    assert torch.equal(again.weight, solved.weight)
    if solved.codes is not None:
        assert torch.equal(again.codes.values, solved.codes.values)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), which=st.integers(0, len(CONSTRAINTS) - 1), size=st.floats(0, 10))
def test_whatever_is_trained_the_result_is_on_the_mask_and_on_the_grid(seed, which, size):
    generator = torch.Generator().manual_seed(seed)
    solved = _solved(torch.randn(5, 16, generator=generator), CONSTRAINTS[which])
    latent = solved.weight + size * torch.randn(5, 16, generator=generator)
    new = Legal.of(solved).solved(latent, solved)
    if solved.mask is not None:
        assert not new.weight[~solved.mask].any()
    if solved.codes is not None:
        assert torch.equal(new.codes.decode(), new.weight)
        assert torch.equal(new.codes.scale, solved.codes.scale) and torch.equal(new.codes.zero, solved.codes.zero)
        assert int(new.codes.values.max()) < 2**solved.codes.bits
    trained = Legal.of(solved).weight(latent)
    assert torch.allclose(trained, new.weight, atol=1e-5)  # what the loss sees is what is stored


def test_gradients_pass_straight_through_inside_the_range_and_not_under_the_mask():
    W = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    solved = _solved(W, Grid(2, None))
    latent = torch.tensor([[0.4, 1.4, 9.0, -1.0]], requires_grad=True)
    Legal.of(solved).weight(latent).sum().backward()
    assert latent.grad.tolist() == [[1, 1, 0, 0]]
    sparse = Solved(W, None, torch.tensor([[True, False, True, False]]), torch.zeros(1))
    latent = W.clone().requires_grad_()
    Legal.of(sparse).weight(latent).sum().backward()
    assert latent.grad.tolist() == [[1, 0, 1, 0]]


def _linear_block(constraint, seed=0, samples=8, tokens=32, width=8):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    inputs = [torch.randn(2, tokens, width, generator=generator) @ mix for _ in range(samples // 2)]
    W = torch.randn(width, width, generator=generator) * width**-0.5
    targets = [x @ W.T for x in inputs]
    solved = {"a": _solved(W, constraint)}
    return BlockProblem(solved, inputs, inputs, targets, lambda w, x: x @ w["a"].T)


def test_a_linear_block_reaches_the_weighted_least_squares_optimum_on_its_mask():
    problem = _linear_block(Sparse(0.5))
    X = torch.cat([x.flatten(0, 1) for x in problem.inputs])
    Y = torch.cat([y.flatten(0, 1) for y in problem.targets])
    weight = Y.norm(dim=1, keepdim=True).reciprocal()
    mask = problem.solved["a"].mask
    best = torch.zeros_like(problem.solved["a"].weight)
    for row in range(len(best)):
        on = mask[row].nonzero()[:, 0]
        best[row, on] = torch.linalg.lstsq(X[:, on] * weight, Y[:, row : row + 1] * weight).solution[:, 0]
    optimum = float(relative_error(X @ best.T, Y))
    start = float(relative_error(X @ problem.solved["a"].weight.T, Y))
    new = reconstruct(problem, Reconstruct(epochs=40, batch=2, learning_rate=0.03, held_back=0.0))["a"]
    reached = float(relative_error(X @ new.weight.T, Y))
    assert optimum < 0.8 * start
    assert optimum - 1e-6 <= reached < optimum + 0.02 * (start - optimum)
    assert new.notes["block_error_after"] == pytest.approx(reached, rel=1e-4)
    assert not new.weight[~mask].any()


@pytest.mark.parametrize("constraint", [Grid(3, None), Both(NM(2, 4), Grid(3, None))], ids=str)
def test_codes_move_on_their_grid_and_the_held_back_error_falls(constraint):
    problem = _linear_block(constraint)
    before = problem.solved["a"]
    after = reconstruct(problem, Reconstruct(epochs=30, learning_rate=0.03))["a"]
    assert torch.equal(after.codes.decode(), after.weight) and torch.equal(after.codes.scale, before.codes.scale)
    assert not torch.equal(after.codes.values, before.codes.values)
    assert after.notes["block_error_after"] < 0.9 * after.notes["block_error_before"]


def test_learned_scales_have_the_gradient_of_a_difference_quotient_and_are_stored_as_judged():
    generator = torch.Generator().manual_seed(7)
    solved = _solved(torch.randn(3, 8, generator=generator), Both(Sparse(0.3), Grid(2, 4)))
    rule = Legal.of(solved)
    latent = solved.weight + 0.2 * torch.randn(3, 8, generator=generator)
    stretch = torch.zeros_like(solved.codes.scale)
    assert torch.allclose(rule.weight(latent, stretch), rule.weight(latent), atol=1e-6)
    towards = torch.randn(3, 8, generator=generator)
    leaf = stretch.clone().requires_grad_()
    (rule.weight(latent, leaf) * towards).sum().backward()
    s, z, top = solved.codes.scale, solved.codes.zero, 2**solved.codes.bits - 1
    for row, group in itertools.product(range(3), range(2)):
        wanted = 0.0
        for c in range(4 * group, 4 * group + 4):
            u = float(latent[row, c] * solved.mask[row, c] / s[row, group])
            low, high = -float(z[row, group]), top - float(z[row, group])
            steps = min(max(u, low), high)
            free = u if low < u < high else 0.0  # straight-through: round(u) has u's slope
            wanted += float(towards[row, c] * s[row, group]) * (round(steps) - free)
        assert float(leaf.grad[row, group]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    moved = stretch + 0.3 * torch.randn(stretch.shape, generator=generator)
    new = rule.solved(latent, solved, moved)
    assert torch.allclose(new.weight, rule.weight(latent, moved), atol=1e-6)
    assert torch.equal(new.codes.decode(), new.weight) and not new.weight[~solved.mask].any()
    assert torch.equal(new.codes.scale.half().float(), new.codes.scale)
    with pytest.raises(ValueError, match="scales"):
        Reconstruct(scales=-1.0)


def test_a_scale_that_would_become_zero_leaves_finite_weights():
    solved = _solved(torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), Grid(2, 4))
    rule = Legal(None, dataclasses.replace(solved.codes, scale=torch.full_like(solved.codes.scale, 1e-9)))
    leaf = torch.zeros_like(solved.codes.scale).requires_grad_()
    weight = rule.weight(solved.weight, leaf)
    weight.sum().backward()
    assert bool(weight.isfinite().all()) and bool(leaf.grad.isfinite().all())


def test_scales_that_learn_too_leave_less_error():
    problem = _linear_block(Grid(2, 4))
    codes, both = (reconstruct(problem, Reconstruct(epochs=30, learning_rate=0.03, scales=s))["a"] for s in (0.0, 0.03))
    assert not torch.equal(both.codes.scale, problem.solved["a"].codes.scale)
    assert both.notes["block_error_after"] < 0.9 * codes.notes["block_error_after"]
    assert both.notes["block_error_before"] == codes.notes["block_error_before"]


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    problem, config = _linear_block(Sparse(0.5)), Reconstruct(epochs=2)
    one, two = (reconstruct(problem, config)["a"].weight for _ in range(2))
    other = reconstruct(problem, dataclasses.replace(config, seed=1))["a"].weight
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_training_that_does_not_help_is_thrown_away():
    problem = _linear_block(Sparse(0.5))
    after = reconstruct(problem, Reconstruct(epochs=1, learning_rate=50.0, warmup=0.0))["a"]
    assert torch.equal(after.weight, problem.solved["a"].weight)
    assert after.notes["block_error_after"] == after.notes["block_error_before"]


def test_a_block_that_is_already_exact_stays_as_it_is():
    problem = _linear_block(None)
    after = reconstruct(problem, Reconstruct(epochs=2))["a"]
    assert torch.equal(after.weight, problem.solved["a"].weight)


def test_inputs_choose_what_the_block_reads():
    problem = _linear_block(Sparse(0.5))
    off = dataclasses.replace(problem, inputs=[2 * x for x in problem.inputs])
    config = Reconstruct(epochs=20, learning_rate=0.02, held_back=0.0)
    made = {kind: reconstruct(off, dataclasses.replace(config, inputs=kind))["a"] for kind in ("compressed", "dense")}
    # targets are those of the unscaled inputs: only training on the compressed stream can repair the factor 2
    assert made["compressed"].notes["block_error_after"] < 0.5 * made["dense"].notes["block_error_after"]


def test_weights_change_places_as_a_naive_loop_says():
    generator = torch.Generator().manual_seed(3)
    latent, grads = torch.randn(4, 6, generator=generator), torch.randn(5, 4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    latent[~mask] = 0.0
    before, moments = latent.clone(), {k: torch.ones(4, 6) for k in ("exp_avg", "exp_avg_sq")}
    new = _moved(Legal(mask, None), latent, list(grads), 0.25, moments).mask
    F = [[sum(float(g[i, j]) ** 2 for g in grads) / 5 for j in range(6)] for i in range(4)]
    rows, columns = [sum(r) for r in F], [sum(r[j] for r in F) for j in range(6)]
    cost, gain = {}, {}
    for i, j in itertools.product(range(4), range(6)):
        h = rows[i] * columns[j] / sum(rows)
        if mask[i, j]:
            cost[i, j] = float(before[i, j]) ** 2 * h
        else:
            gain[i, j] = (sum(float(g[i, j]) for g in grads) / 5) ** 2 / h
    count = round(0.25 * len(cost))
    out = set(sorted(cost, key=cost.get)[:count])
    into = set(sorted(gain, key=gain.get, reverse=True)[:count])
    assert {tuple(x) for x in new.nonzero().tolist()} == (set(cost) - out) | into
    for i, j in out | into:
        assert latent[i, j] == 0 and moments["exp_avg"][i, j] == 0
    assert torch.equal(latent[new & mask], before[new & mask])


def test_masks_that_may_move_find_a_better_support_than_the_one_they_were_given():
    problem = _linear_block(Sparse(0.7), width=16)
    W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    bad = _solved(W, Sparse(0.7))  # the largest of other weights: a support that has nothing to do with the block
    problem = dataclasses.replace(problem, solved={"a": bad})
    config = Reconstruct(epochs=30, learning_rate=0.03, held_back=0.0)
    still = reconstruct(problem, config)["a"]
    assert torch.equal(reconstruct(problem, dataclasses.replace(config, reselect=0.3))["a"].mask, bad.mask)  # not free
    free = dataclasses.replace(problem, free={"a"})
    moved = reconstruct(free, dataclasses.replace(config, reselect=0.3))["a"]
    assert int(moved.mask.sum()) == int(bad.mask.sum()) and not moved.weight[~moved.mask].any()
    assert moved.notes["block_error_after"] < 0.8 * still.notes["block_error_after"]
    again = reconstruct(free, dataclasses.replace(config, reselect=0.3))["a"]
    assert torch.equal(moved.weight, again.weight)


def test_a_loss_that_is_not_finite_names_block_and_step():
    problem = dataclasses.replace(_linear_block(Sparse(0.5)), number=7, forward=lambda w, x: x @ w["a"].T * torch.nan)
    with pytest.raises(NumericalError, match=r"block 7.*step 1 of"):
        reconstruct(problem, Reconstruct(epochs=1))


def test_the_rate_rises_then_falls_to_zero():
    rates = [rate(s, 100, 0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.01


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"reselect": 1.0}, {"rounds": 0}, {"learning_rate": 0.0}, {"held_back": 1.0}, {"warmup": -0.1}],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        Reconstruct(**bad)
