"""The sweep against a naive loop that inverts the trailing Hessian at every column (methods/01 §2.1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import NM, Both, Fixed, Grid, Problem, Sparse, Stack, Stats, damped, factorise, sweep
from lissom.core.factor import invert_upper


def correlated(tokens=400, width=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * 0.4
    return torch.randn(tokens, width, generator=g, dtype=torch.float64) @ (mix + torch.eye(width)).double()


def weights(rows=8, width=32, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(W, H, keep_rule, round_rule, block):
    """Column by column with explicit inverses of H[j:, j:]: the definition, O(C⁴)."""
    W, Q = W.clone(), torch.zeros_like(W)
    columns = W.shape[1]
    loss = torch.zeros(W.shape[0], dtype=W.dtype)
    keep = torch.ones_like(W, dtype=torch.bool)
    for j in range(columns):
        if j % block == 0:
            stop = min(j + block, columns)
            d = torch.stack([torch.linalg.inv(H[k:, k:])[0, 0] for k in range(j, stop)])
            keep[:, j:stop] = keep_rule(W[:, j:stop].square() / d)
        A = torch.linalg.inv(H[j:, j:])
        w = W[:, j].clone()
        q = round_rule(w * keep[:, j], j, W)
        Q[:, j] = q
        loss += (w - q) ** 2 / (2 * A[0, 0])
        W[:, j:] -= ((w - q) / A[0, 0])[:, None] * A[0]
    return Q, loss


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("p", [0.5, 0.75])
def test_unstructured_matches_the_definition(block, p):
    problem = Problem.of(weights(), Stats.of(correlated()), Sparse(p))
    H, _ = damped(problem.stats.hessian, 0.01)
    pattern = Sparse(p)
    Q, loss = naive(problem.weight, H, lambda s: pattern.select(s), lambda w, j, W: w, block)
    solved = sweep(problem, problem.factor(), block)
    assert torch.allclose(solved.weight, Q, atol=1e-9)
    assert torch.allclose(solved.error, loss, atol=1e-9)
    assert (solved.weight == 0).sum() == round(p * 8 * block) * (32 // block)


def test_n_of_m_is_chosen_on_the_updated_weights():
    problem = Problem.of(weights(), Stats.of(correlated()), NM(2, 4))
    H, _ = damped(problem.stats.hessian, 0.01)
    Q, _ = naive(problem.weight, H, lambda s: NM(2, 4).select(s), lambda w, j, W: w, 4)
    solved = sweep(problem, problem.factor(), 16)
    assert torch.allclose(solved.weight, Q, atol=1e-9)
    assert ((solved.weight.reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("group", [4, 8, 16])
def test_grids_see_the_weights_as_updated_inside_the_block(group):
    """A group that starts in the middle of a block must not be fitted on stale weights."""
    grid = Grid(3, group)
    problem = Problem.of(weights(), Stats.of(correlated()), grid)
    H, _ = damped(problem.stats.hessian, 0.01)
    params = {}

    def rounding(w, j, W):
        if j % group == 0:
            params["now"] = grid.fit(W[:, j : j + group])
        return params["now"].project(w[:, None])[:, 0]

    Q, loss = naive(problem.weight, H, lambda s: torch.ones_like(s, dtype=torch.bool), rounding, 32)
    solved = sweep(problem, problem.factor(), 32)
    assert torch.allclose(solved.weight, Q, atol=1e-6)
    assert torch.allclose(solved.error, loss, atol=1e-6)


@pytest.mark.parametrize(
    "constraint",
    [Sparse(0.7), NM(4, 16), Grid(4, 8), Grid(3, None), Both(Sparse(0.6), Grid(4, 16)), Both(NM(1, 4), Grid(2, 8))],
    ids=str,
)
def test_reported_error_is_the_quadratic_form(constraint):
    """Σ ½e² = ½ tr(Δ H Δᵀ) with the damped H, whatever the block size."""
    problem = Problem.of(weights().float(), Stats.of(correlated().float()), constraint)
    for block in (8, 32):
        solved = sweep(problem, problem.factor(), block)
        assert torch.allclose(solved.error, problem.error(solved.weight), rtol=1e-3)
        if solved.codes is not None:
            assert torch.equal(solved.codes.decode(), solved.weight)


def test_feedback_helps_on_correlated_inputs():
    problem = Problem.of(weights(64, 256), Stats.of(correlated(1000, 256)), Sparse(0.7))
    assert sweep(problem, problem.factor()).error.sum() < 0.9 * problem.project(problem.weight.abs()).error.sum()


def test_white_inputs_give_the_plain_projection():
    """With H ∝ I there is nothing to feed back."""
    stats = Stats(100, torch.zeros(32), torch.ones(32) * 100, torch.ones(32), 100 * torch.eye(32))
    W = weights().float()
    for constraint in (Sparse(0.5), NM(2, 4), Grid(4, 8)):
        problem = Problem.of(W, stats, constraint)
        assert torch.equal(sweep(problem, problem.factor(), 32).weight, problem.project(W.abs()).weight)


def test_a_stack_equals_its_layers_alone():
    stats = Stats.of(correlated().float())
    A, B = weights(8, seed=2).float(), weights(4, seed=3).float()
    parts = ((8, Both(Sparse(0.5), Grid(4, 8))), (4, Both(Sparse(0.75), Grid(3, 8))))
    stacked = Problem(torch.cat([A, B]), stats, Stack(parts), ("a", "b"))
    together = stacked.split(sweep(stacked, stacked.factor()))
    for name, W, (_, constraint) in (("a", A, parts[0]), ("b", B, parts[1])):
        alone = Problem.of(W, stats, constraint)
        solved = sweep(alone, alone.factor())
        assert torch.allclose(together[name].weight, solved.weight, atol=1e-6)
        assert together[name].codes.bits == constraint.grid.bits
        assert torch.equal(together[name].codes.decode(), together[name].weight)


def test_activation_order_keeps_groups_contiguous_and_lowers_the_error():
    X = correlated().float() * torch.logspace(-1.5, 0.5, 32)
    problem = Problem.of(weights(64).float(), Stats.of(X), Grid(2, 8))
    plain = sweep(problem, problem.factor(), static_groups=True)
    ordered = sweep(problem, problem.factor(by_activation=True))
    assert torch.equal(ordered.codes.decode(), ordered.weight)
    assert torch.equal(ordered.codes.scale, plain.codes.scale)
    assert ordered.error.sum() < plain.error.sum()
    assert torch.allclose(ordered.error, problem.error(ordered.weight), rtol=1e-3)


def test_a_fixed_mask_keeps_its_zeros_in_any_order():
    mask = torch.rand(8, 32, generator=torch.Generator().manual_seed(5)) > 0.5
    problem = Problem.of(weights().float(), Stats.of(correlated().float()), Both(Fixed(mask), Grid(4, 8)))
    for by_activation in (False, True):
        solved = sweep(problem, problem.factor(by_activation=by_activation))
        assert (solved.weight[~mask] == 0).all()
        assert torch.equal(solved.mask, mask)


def test_dead_inputs_lose_their_weights():
    X = correlated().float()
    X[:, 3] = 0
    problem = Problem.of(weights().float(), Stats.of(X), Sparse(0.5))
    solved = sweep(problem, problem.factor())
    assert (solved.weight[:, 3] == 0).all()
    assert solved.notes["dead"] == 1


def test_damping_escalates_until_positive_definite():
    H = torch.diag(torch.tensor([1.0, 1.0, -0.05, 1.0]))
    factor = factorise(H, 0.01)
    assert factor.damping >= 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_rows_of_the_trailing_inverse_come_from_one_factor(j, seed):
    """U_jj² and U_jj·U[j, j:] are the first row of inv(H[j:, j:])."""
    X = correlated(80, 13, seed)
    H = X.T @ X
    U = factorise(H, 0.0).U
    inverse = torch.linalg.inv(H[j:, j:])
    assert torch.allclose(U[j, j] * U[j, j:], inverse[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("n", [5, 128, 129, 300])
def test_the_inverse_by_halves_is_the_inverse(n):
    R = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).triu(1) / n
    R += torch.diag(torch.rand(n, dtype=torch.float64) + 0.5)
    U = invert_upper(R)
    assert not U.tril(-1).any()
    torch.testing.assert_close(U @ R, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-10)
