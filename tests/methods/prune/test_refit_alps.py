"""Refit against lstsq row by row; ALPS against SparseGPT and against brute force over all supports."""

import itertools

import pytest
import torch

from lissom.core import NM, Both, Grid, NMByRow, Problem, Sparse, Stack, Stats, damped
from lissom.methods.prune import METHODS
from lissom.methods.prune.alps import ALPS, admm, alps
from lissom.methods.prune.refit import Refit, refit
from lissom.methods.prune.sparsegpt import SparseGPT, sparsegpt


def correlated(rows=24, columns=32, tokens=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, columns, generator=g)
    spectrum = torch.arange(1, columns + 1).float().rsqrt()
    X = (torch.randn(tokens, columns, generator=g) * spectrum) @ basis + 0.1 * torch.randn(tokens, columns, generator=g)
    return torch.randn(rows, columns, generator=g), Stats.of(X)


def lstsq_rows(W, H, mask):
    """Row by row in double precision: min ‖(w − ŵ) L‖ with H = L Lᵀ."""
    L = torch.linalg.cholesky(H.double())
    out = torch.zeros_like(W, dtype=torch.double)
    for r in range(len(W)):
        S = mask[r].nonzero()[:, 0]
        out[r, S] = torch.linalg.lstsq(L[S].T, L.T @ W[r].double()[:, None]).solution[:, 0]
    return out


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_refit_is_least_squares(solver):
    W, stats = correlated()
    problem = Problem.of(W, stats, Sparse(0.6))
    start = METHODS["wanda"].run(problem, METHODS["wanda"].config())
    solved = refit(problem.then(start), Refit(solver, tolerance=1e-6))
    H, _ = damped(stats.hessian, 0.01)
    expected = lstsq_rows(W, H, start.mask)
    assert torch.equal(solved.mask, start.mask)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert solved.error.sum() < 0.9 * start.error.sum()


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_every_cg_step_lowers_the_error_of_every_row(iterations):
    W, stats = correlated(seed=1)
    problem = Problem.of(W, stats, Sparse(0.7))
    start = sparsegpt(problem, SparseGPT())
    solved = refit(problem.then(start), Refit("cg", tolerance=0.0, iterations=iterations))
    assert bool((solved.error <= problem.error(start.weight) * (1 + 1e-5)).all())


def test_rows_with_nothing_kept_and_everything_kept():
    W, stats = correlated(rows=3)
    mask = torch.zeros(3, 32, dtype=torch.bool)
    mask[1] = True
    mask[2, :5] = True
    for solver in ("cg", "exact"):
        problem = Problem(W, stats, Stack.of(Sparse(0.5), 3).freeze(mask))
        weight = refit(problem, Refit(solver)).weight
        assert not weight[0].any() and torch.equal(weight[1], W[1]) and weight[2, :5].abs().min() > 0


@pytest.mark.parametrize("pattern", [Sparse(0.7), Sparse(0.7, "row"), NM(2, 4), NM(4, 16), NMByRow(0.7, 16)])
def test_alps_beats_sparsegpt_and_its_refit(pattern):
    W, stats = correlated(48, 64, 800)
    problem = Problem.of(W, stats, pattern)
    greedy = sparsegpt(problem, SparseGPT())
    fitted = refit(problem.then(greedy), Refit())
    solved = alps(problem, ALPS())
    assert solved.error.sum() < fitted.error.sum() < greedy.error.sum()
    assert solved.error.sum() < 0.8 * greedy.error.sum()


def test_alps_is_near_the_best_of_all_supports():
    W, stats = correlated(12, 10, 200, seed=3)
    problem = Problem.of(W, stats, Sparse(0.6, "row"))
    H, _ = damped(stats.hessian, 0.01)
    best = torch.full((12,), float("inf"))
    for support in itertools.combinations(range(10), 4):
        mask = torch.zeros(12, 10, dtype=torch.bool)
        mask[:, list(support)] = True
        best = torch.minimum(best, problem.error(lstsq_rows(W, H, mask).float()))
    ratio = alps(problem, ALPS(iterations=200, rho=0.01)).error.sum() / best.sum()
    greedy = sparsegpt(problem, SparseGPT()).error.sum() / best.sum()
    assert 0.999 < ratio < 1.25 < greedy


def test_stacked_layers_are_solved_as_if_alone():
    W, stats = correlated(40, 32)
    parts = ((24, Both(Sparse(0.8))), (16, Both(NM(2, 4))))
    config = ALPS(iterations=12, settled=0.0, tolerance=1e-5)
    together = alps(Problem(W, stats, Stack(parts), ("a", "b")), config)
    alone = [alps(Problem.of(W[:24], stats, Sparse(0.8)), config), alps(Problem.of(W[24:], stats, NM(2, 4)), config)]
    same = (together.mask == torch.cat([s.mask for s in alone])).float().mean()
    assert same > 0.98  # ρ follows the changes of the whole stack
    assert torch.equal((~together.mask[:24]).sum(), torch.tensor(round(0.8 * 24 * 32)))


def test_a_grid_after_the_refit_keeps_zeros_and_decodes_exactly():
    W, stats = correlated()
    problem = Problem.of(W, stats, Both(Sparse(0.5), Grid(4, 16)))
    for solved in (alps(problem, ALPS()), refit(problem.then(sparsegpt(problem, SparseGPT())), Refit())):
        assert torch.equal(solved.codes.decode(), solved.weight)
        assert not solved.weight[~solved.mask].any()
        torch.testing.assert_close(solved.error, problem.error(solved.weight))


@pytest.mark.parametrize("relaxation", [1.0, 1.4])
def test_admm_is_the_algorithm_as_it_is_written(relaxation):
    """The paper's updates with V and W H formed, in double precision, against the one product per iteration."""
    W, stats = correlated(12, 16, 300)
    H, _ = damped(stats.hessian, 0.01)
    scale = H.diagonal().sqrt()
    H, W = (H / scale / scale[:, None]).double(), (W * scale).double()
    rho, D, V = 0.05, W, torch.zeros_like(W)
    first = Sparse(0.6).select(W.abs())
    for done in range(1, 9):
        B = torch.linalg.solve(H + rho * torch.eye(16, dtype=torch.float64), (W @ H - V + rho * D).T).T
        B = relaxation * B + (1 - relaxation) * D
        mask = Sparse(0.6).select((B + V / rho).abs())
        D, V = torch.where(mask, B + V / rho, 0.0), V + rho * (B - torch.where(mask, B + V / rho, 0.0))
        if done == 4:
            before = mask
            rho *= 1.7 if float((mask != first).sum()) / int(first.sum()) > 0.1 else 1.5
    config = ALPS(iterations=8, rho=0.05, interval=4, relaxation=relaxation, settled=0.0)
    support, weight, done = admm(H, W, Stack.of(Sparse(0.6), 12), config)
    assert done == 8 and not torch.equal(mask, before)
    assert torch.equal(support, mask)
    torch.testing.assert_close(weight, D, rtol=1e-5, atol=1e-7)
