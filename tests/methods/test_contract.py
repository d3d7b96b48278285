"""What every pruning solver promises, whatever its method: parametrised over the METHODS table."""

import dataclasses

import pytest
import torch

from lissom.core import NM, Both, Fixed, Grid, LowRank, NMByRow, Problem, RecipeError, Sparse, Stack, Stacked, Stats
from lissom.methods.prune import METHODS as TABLE

METHODS = {name: method for name, method in TABLE.items() if method.kind == "solver"}
ROWS, COLUMNS, SAMPLES = 24, 32, 12
PATTERNS = {"layer": Sparse(0.7), "row": Sparse(0.6, "row"), "2:4": NM(2, 4), "4:16": NM(4, 16)}
PATTERNS["n:16 by row"] = NMByRow(0.7, 16)
# a sum of a sparse and a low-rank matrix has no zeros
DENSE_RESULT = {"oats"}


def problem(constraint, rows=ROWS, seed=0, white=False):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(600, COLUMNS, generator=g)
    if not white:
        X = X @ torch.randn(COLUMNS, COLUMNS, generator=g) + 0.3
    stats = Stats.of(X)
    if white:
        stats = dataclasses.replace(stats, gram=torch.eye(COLUMNS) * 600, sumsq=torch.full((COLUMNS,), 600.0))
    W = torch.randn(rows, COLUMNS, generator=g)
    gradients = torch.randn(SAMPLES, rows, COLUMNS, generator=g)
    outputs = torch.randn(50, rows, generator=g)
    extras = {
        "samples": gradients,
        "gradient": gradients.square().sum(0).sqrt(),
        "gradient_l1": gradients.abs().sum(0),
        "fisher": gradients.square().mean(0),
        "output_gram": outputs.T @ outputs / 50,
    }
    stack = constraint if isinstance(constraint, Stack) else Stack.of(constraint, rows)
    return Problem(W, stats, stack, tuple(f"l{i}" for i in range(len(stack.parts))), extras=extras)


def run(name, given):
    method = METHODS[name]
    return method.run(given, method.config())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_the_pattern_holds_exactly(name, pattern):
    if name in DENSE_RESULT or name == "refit":
        pytest.skip("tested in the method's own file")
    constraint = PATTERNS[pattern]
    solved = run(name, problem(constraint))
    assert not solved.weight[~solved.mask].any() and solved.weight.isfinite().all()
    kept = solved.mask
    if isinstance(constraint, NM):
        assert bool((kept.reshape(ROWS, -1, constraint.m).sum(2) == constraint.n).all())
    elif isinstance(constraint, NMByRow):
        counts = kept.reshape(ROWS, -1, constraint.m).sum(2)
        assert bool((counts == counts[:, :1]).all())
        assert int(counts[:, 0].sum()) == ROWS * constraint.m - round(constraint.p * ROWS * constraint.m)
    elif constraint.per == "row":
        assert bool(((~kept).sum(1) == round(constraint.p * COLUMNS)).all())
    else:
        assert int((~kept).sum()) == round(constraint.p * kept.numel())


@pytest.mark.parametrize("name", METHODS)
def test_the_reported_error_is_the_quadratic_form(name):
    given = problem(Sparse(0.5))
    solved = run(name, given)
    delta = (solved.weight - given.weight).double()
    H = given.stats.hessian.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(COLUMNS)
    torch.testing.assert_close(solved.error.double(), 0.5 * ((delta @ H) * delta).sum(1), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_zeros_of_a_given_mask_stay(name):
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) > 0.6
    solved = run(name, problem(Fixed(mask)))
    assert torch.equal(solved.mask, mask) and not solved.weight[~mask].any()


@pytest.mark.parametrize("name", METHODS)
def test_no_zeros_and_no_grid_give_the_weights_back_bit_for_bit(name):
    given = problem(Sparse(0.0))
    if name == "oats":  # half precision is what is stored
        given = dataclasses.replace(given, weight=given.weight.half().float())
    assert torch.equal(run(name, given).weight, given.weight)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "codes" in m.makes])
def test_codes_decode_to_the_weights_and_zeros_stay_zero(name):
    given = problem(Both(Sparse(0.5), Grid(4, 16)))
    solved = run(name, given)
    assert torch.equal(solved.codes.decode(), solved.weight)
    assert not solved.weight[~solved.mask].any()
    torch.testing.assert_close(solved.error, given.error(solved.weight), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in DENSE_RESULT | {"refit"}])
def test_layers_of_a_stack_meet_budgets_of_their_own(name):
    parts = ((16, Both(Sparse(0.75))), (8, Both(Sparse(0.25))), (8, Both(NM(2, 4))))
    solved = run(name, problem(Stack(parts), rows=32))
    zeros = ~solved.mask
    assert int(zeros[:16].sum()) == 16 * 24 and int(zeros[16:24].sum()) == 8 * 8
    assert bool((zeros[24:].reshape(8, -1, 4).sum(2) == 2).all())


# with white inputs nothing can be compensated, and every one of these scores is |w|
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "isc", "l-obd", "l-obs"])
def test_white_inputs_are_plain_projection(name):
    given = problem(Sparse(0.6), white=True)
    expected = run("magnitude", given)
    solved = run(name, given)
    assert torch.equal(solved.mask, expected.mask)
    torch.testing.assert_close(solved.weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_white_inputs_are_nearly_plain_projection_for_alps():
    # ADMM on a non-convex set stops at supports that differ in near-ties
    given = problem(Sparse(0.6), white=True)
    assert run("alps", given).error.sum() < 1.01 * run("magnitude", given).error.sum()


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "gradients" in m.needs])
def test_missing_gradients_are_named(name):
    given = dataclasses.replace(problem(Sparse(0.5)), extras={})
    with pytest.raises(RecipeError, match=f"`{name}` on l0 needs"):
        run(name, given)


@pytest.mark.parametrize("first", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["refit", "alps"])
def test_steps_that_solve_for_the_weights_never_raise_the_error(first, name):
    given = problem(Sparse(0.6))
    start = run(first, given)
    solved = run(name, given.then(start))
    assert torch.equal(solved.mask, start.mask)
    assert bool((solved.error <= start.error * (1 + 1e-3) + 1e-6).all())


def test_a_low_rank_result_is_stored_as_one():
    solved = run("oats", problem(Sparse(0.5)))
    assert isinstance(solved.stored, Stacked) and isinstance(solved.stored.parts[0][1], LowRank)
    assert torch.equal(solved.stored.decode(), solved.weight)
