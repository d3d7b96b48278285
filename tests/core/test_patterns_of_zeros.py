"""Units of weights and earlier zeros, in every place where a constraint selects: against naive loops."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from lissom.core import NM, Both, Grid, NMByRow, Problem, Sparse, Stack, Stats, factorise, sweep
from lissom.methods.prune import METHODS

ROWS, COLUMNS = 16, 32
UNITS = {(1, 1): "element", (4, 1): "tall", (1, 16): "wide", (2, 8): "both", (1, 0): "row", (0, 1): "column"}


def naive(score, p, unit, per):
    """Keep-mask by sorting units one at a time."""
    r, c = unit[0] or score.shape[0], unit[1] or score.shape[1]
    keep = torch.ones_like(score, dtype=torch.bool)
    places = [(i, j) for i in range(0, score.shape[0], r) for j in range(0, score.shape[1], c)]
    bands = {i: [x for x in places if x[0] == i] for i, _ in places} if per == "row" else {0: places}
    for band in bands.values():
        ranked = sorted(band, key=lambda x: float(score[x[0] : x[0] + r, x[1] : x[1] + c].double().sum()))
        for i, j in ranked[: round(p * len(band))]:
            keep[i : i + r, j : j + c] = False
    return keep


def random_problem(constraint, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g)
    return Problem.of(torch.randn(ROWS, COLUMNS, generator=g), Stats.of(X), constraint)


@pytest.mark.parametrize("per", ["layer", "row"])
@pytest.mark.parametrize("unit", UNITS, ids=UNITS.get)
def test_units_are_those_of_a_naive_loop(unit, per):
    if per == "row" and unit[1] == 0:
        pytest.skip("a row is one unit")
    score = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Sparse(0.5, per, unit).select(score), naive(score, 0.5, unit, per))


@pytest.mark.parametrize("total", range(1, 12))
def test_n_of_m_by_row_keeps_the_most_that_any_choice_of_n_can(total):
    """Against every N for each of three rows of two groups of four."""
    for seed in range(10):
        score = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
        best = score.view(3, 2, 4).sort(2, descending=True).values.sum(1).cumsum(1)  # (rows, N - 1)
        most = max(
            sum(float(best[r, n - 1]) for r, n in enumerate(ns) if n)
            for ns in product(range(5), repeat=3)
            if sum(ns) == total
        )
        keep = NMByRow(1 - total / 12, 4).select(score)
        counts = keep.view(3, 2, 4).sum(2)
        assert torch.equal(counts[:, 0], counts[:, 1]) and int(counts[:, 0].sum()) == total
        assert float(score[keep].sum()) == pytest.approx(most)


def test_n_of_m_by_row_with_equal_scores_keeps_the_number():
    keep = NMByRow(0.5, 4).select(torch.zeros(6, 8))
    assert int(keep.sum()) == 24
    with pytest.raises(ValueError, match="do not divide"):
        NMByRow(0.5, 16).select(torch.zeros(2, 24))


def test_units_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        Sparse(0.5, unit=(3, 1)).select(torch.rand(16, 32))


@pytest.mark.parametrize("unit", UNITS, ids=UNITS.get)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.score and "gradients" not in m.needs])
def test_every_method_that_scores_removes_whole_units(name, unit):
    """Each unit is gone or stays whole; scores are what was asked for where nothing is swept."""
    method, constraint = METHODS[name], Sparse(0.5, unit=unit)
    problem = random_problem(constraint)
    solved = method.run(problem, method.config())
    gone = Sparse(0.5, unit=unit).units((~solved.mask).float())
    size = ROWS * COLUMNS // gone.numel()
    assert set(gone.unique().tolist()) == {0.0, float(size)}
    assert int((~solved.mask).sum()) == ROWS * COLUMNS // 2 and not solved.weight[~solved.mask].any()
    if name not in ("sparsegpt", "isc", "alps"):
        score = method.score(problem, method.config())
        assert torch.equal(solved.mask, naive(score, 0.5, unit, "layer"))


def test_a_sweep_over_whole_rows_leaves_the_other_rows_alone():
    """Nothing is shared between rows, so the kept ones stay dense; the row's score is the sum of w² / U²."""
    problem = random_problem(Sparse(0.25, unit=(1, 0)))
    solved = METHODS["sparsegpt"].run(problem, METHODS["sparsegpt"].config())
    cost = (problem.weight.square() / problem.factor().diagonal.square()).sum(1)
    assert set((~solved.mask).all(1).nonzero().flatten().tolist()) == set(cost.argsort()[:4].tolist())
    assert torch.equal(solved.weight[solved.mask], problem.weight[solved.mask])


def test_units_beside_a_grid_and_another_pattern_in_one_stack():
    parts = ((8, Both(Sparse(0.5, unit=(1, 16)), Grid(4, 16))), (8, Both(NM(2, 4), Grid(4, 16))))
    problem = random_problem(Stack(parts))
    solved = sweep(problem, factorise(problem.stats.hessian))
    assert torch.equal(solved.codes.decode(), solved.weight)
    assert set(solved.mask[:8].reshape(8, 2, 16).float().mean(2).unique().tolist()) <= {0.0, 1.0}
    assert bool((solved.mask[8:].reshape(8, -1, 4).sum(2) == 2).all())


@pytest.mark.parametrize("pattern", [Sparse(0.6), Sparse(0.6, "row"), Sparse(0.5, unit=(1, 16)), NM(2, 8)])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "isc", "alps", "l-obs", "dsnot"])
def test_zeros_of_an_earlier_shot_stay_and_count(name, pattern):
    """SparseGPT's feedback moves weights that were zero: without the mask of what is gone they would come back."""
    if name in ("l-obs", "dsnot") and getattr(pattern, "unit", (1, 1)) != (1, 1):
        pytest.skip("removes or exchanges single weights")
    before = NM(5, 8) if isinstance(pattern, NM) else Sparse(0.25, pattern.per, pattern.unit)
    gone = ~before.select(torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)))
    problem = random_problem(Both(pattern, None, ~gone))
    problem.weight[gone] = 0
    solved = METHODS[name].run(problem, METHODS[name].config())
    assert not solved.weight[gone].any() and not solved.mask[gone].any()
    zeros = (~solved.mask).float()
    if isinstance(pattern, NM):
        assert bool((zeros.reshape(ROWS, -1, 8).sum(2) == 6).all())
    else:
        per = zeros.mean(1) if pattern.per == "row" else zeros.mean()
        torch.testing.assert_close(per, torch.full_like(per, pattern.p), atol=0.5 / COLUMNS, rtol=0)


def test_white_statistics_are_those_of_the_identity():
    white, n = Stats.white(6), 50_000
    X = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    seen = Stats.of(X)
    torch.testing.assert_close(white.hessian, seen.hessian, atol=0.05, rtol=0)
    torch.testing.assert_close(white.norm, seen.norm / n**0.5, atol=0.02, rtol=0)
    assert not white.mean.any() and bool((white.variance == 1).all())


def test_worth_of_rows_by_hand():
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Both(Sparse(0.5)).select(score).tolist() == [[False, False], [True, True]]
    assert Both(Sparse(0.5), worth=torch.tensor([5.0, 1.0])).select(score).tolist() == [[True, True], [False, False]]
    assert Both(NM(1, 2), worth=torch.tensor([5.0, 1.0])).select(score).tolist() == [[False, True], [False, True]]
    within = torch.tensor([[False, True], [True, True]])
    kept = Both(Sparse(0.5), within=within, worth=torch.tensor([5.0, 1.0])).select(score)
    assert kept.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "isc", "alps"])
@pytest.mark.parametrize("grid", [None, Grid(4, 8)])
def test_rows_that_are_worth_more_keep_more_whatever_the_solver(name, grid):
    """The worth of a row multiplies the scores of all its weights, so its place in a stack must not change a thing."""
    worth = torch.ones(ROWS)
    worth[3], worth[7] = 1e3, 1e-3
    part = Both(Sparse(0.5), grid, worth=worth)
    method = METHODS[name]
    solved = method.run(random_problem(part), method.config())
    kept = (solved.weight != 0).sum(1)
    assert int(kept[7]) <= 2 < COLUMNS - 4 <= int(solved.mask[3].sum())
    assert int(solved.mask.sum()) == ROWS * COLUMNS // 2
    other = Both(Sparse(0.25), grid)
    problem = random_problem(part)
    both = replace(
        problem,
        weight=torch.cat([problem.weight, problem.weight]),
        constraint=Stack(((ROWS, other), (ROWS, part))),
    )
    if name != "alps":  # its iterations stop by the whole stack
        assert torch.equal(method.run(both, method.config()).mask[ROWS:], solved.mask)


def test_activation_order_keeps_the_worth_of_rows():
    worth = torch.ones(ROWS)
    worth[3] = 1e3
    problem = random_problem(Both(Sparse(0.5), worth=worth))
    solved = sweep(problem, problem.factor(0.01, True))
    assert int(solved.mask[3].sum()) >= COLUMNS - 4
