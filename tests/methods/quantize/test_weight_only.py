"""One oracle for each weight-only method."""

from __future__ import annotations

import itertools

import pytest
import torch

from lissom.core import Both, Codes, Grid, GridParams, Problem, Rotation, Stack, Stats, damped
from lissom.core.grid import spread_groups
from lissom.methods.quantize import METHODS
from lissom.methods.quantize.autoround import AutoRound, autoround
from lissom.methods.quantize.awq import AWQ, awq, awq_scale
from lissom.methods.quantize.bcq import BCQ, bcq, from_uniform, lut_product
from lissom.methods.quantize.codebook import Codebook, codebook, known, nearest, normal_float, table_of
from lissom.methods.quantize.coordinate import descend, refit
from lissom.methods.quantize.descent import Descent, descent
from lissom.methods.quantize.gobo import centroids, outliers
from lissom.methods.quantize.hqq import HQQ, hqq, shrink
from lissom.methods.quantize.loftq import LoftQ, loftq
from lissom.methods.quantize.quip import QuIP, incoherent, quip
from lissom.methods.quantize.spqr import SpQR, spqr, without_each

from .problems import inputs, problem


def _rtn(p: Problem):
    return METHODS["rtn"].run(p, METHODS["rtn"].config())


def test_hqq_shrink_is_the_soft_threshold_at_p_1_and_the_norm_never_rises() -> None:
    e = torch.linspace(-2, 2, 41)
    assert torch.allclose(shrink(e, 2.0, 1.0), e.sign() * (e.abs() - 0.5).clamp_min(0))
    p = problem(constraint=Grid(2, 16))
    W = p.weight
    solved = hqq(p, HQQ())
    assert (solved.weight - W).abs().pow(0.7).sum() <= (_rtn(p).weight - W).abs().pow(0.7).sum()


def test_awq_measures_outputs_and_without_scaling_is_round_to_nearest() -> None:
    X = inputs(32)
    p = problem()
    assert torch.equal(awq(p, AWQ(steps=1, clip=False)).weight, _rtn(p).weight)
    s, notes = awq_scale(p.weight, p, AWQ(damping=0.0))
    best = torch.inf
    for i in range(20):  # the search again, with activations instead of the Gram matrix
        trial = X.square().mean(0).sqrt().pow(i / 20).clamp_min(1e-4)
        trial = (trial / (trial.max() * trial.min()).sqrt()).half().float()
        scaled = p.weight * trial
        delta = Codes.round(scaled, p.constraint.fit_all(scaled), 3, 16).decode() / trial - p.weight
        best = min(best, float((X @ delta.T).square().sum() / (X @ p.weight.T).square().sum()))
    assert notes["error_scaled"] == pytest.approx(best, rel=1e-3)
    y = (X / s) @ (p.weight * s).T
    assert torch.allclose(y, X @ p.weight.T, atol=1e-4)


def test_autoround_starts_at_round_to_nearest_and_moves_integers_by_one_at_most() -> None:
    p = problem()
    rtn = _rtn(p)
    assert rtn.codes is not None
    assert torch.equal(autoround(p, AutoRound(iterations=0)).weight, rtn.weight)
    solved = autoround(p, AutoRound(iterations=50, learn_range=False))
    assert solved.codes is not None
    assert int((solved.codes.values.int() - rtn.codes.values.int()).abs().max()) <= 1
    assert bool((solved.error <= rtn.error + 1e-7).all())  # row by row, the best iterate


def test_descent_ends_where_no_single_code_change_helps_and_never_rises() -> None:
    p = problem(6, 12, Grid(2, 6))
    H, _ = damped(p.stats.hessian, 0.01)
    errors = [float(descent(p, Descent(passes=n)).error.sum()) for n in (0, 1, 2, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    codes = descent(p, Descent(passes=30, refit=False)).codes
    assert codes is not None
    scale, zero = (spread_groups(t, 12, 6) for t in (codes.scale, codes.zero))
    base = p.error(codes.decode())
    for r, c, q in itertools.product(range(6), range(12), range(4)):
        values = codes.values.float().clone()
        values[r, c] = q
        delta = ((values - zero) * scale - p.weight)[r]
        assert float(0.5 * delta @ H @ delta) >= float(base[r]) * (1 - 1e-4)


def test_refit_is_the_weighted_least_squares_solution() -> None:
    torch.manual_seed(0)
    X = torch.randn(60, 8)
    H, W = X.T @ X, torch.randn(3, 8)
    params = GridParams(torch.full((3, 2), 0.7), torch.full((3, 2), 3.0), torch.full((3, 2), 8.0))
    code = torch.randint(0, 8, (3, 8)).float()
    scale = refit(W, H, code, params, 4)
    for r in range(3):
        A = torch.zeros(8, 2)
        A[:4, 0], A[4:, 1] = code[r, :4] - 3, code[r, 4:] - 3
        want = torch.linalg.lstsq(X @ A, X @ W[r]).solution
        if bool((want > 0).all()):
            assert torch.allclose(scale[r], want, rtol=2e-3)
    wide = GridParams(*(spread_groups(t, 8, 4) for t in (scale, params.zero, params.levels)))
    before = wide.decode(code) - W
    after = wide.decode(descend(W, H, code, wide, None)) - W
    assert float(((after @ H) * after).sum()) <= float(((before @ H) * before).sum())


def test_quip_preparation_is_undone_exactly_and_flattens() -> None:
    p = problem(16, 36)
    W = p.weight.clone()
    W[3, 4] = 5.0
    H, _ = damped(p.stats.hessian, 0.01)
    left, right = Rotation(16, 1, "orthogonal"), Rotation(36, 2, "orthogonal")
    turned, K, d = incoherent(W, H, left, right, True)
    back = right.undo(left.undo(turned.T.contiguous()).T.contiguous()) / d
    assert torch.allclose(back, W, atol=1e-4)
    assert torch.allclose((turned @ K * turned).sum(), (W @ H * W).sum(), rtol=1e-3)  # the loss is the same
    assert turned.abs().max() / turned.norm() < W.abs().max() / W.norm()


def test_quip_beats_gptq_at_two_bits() -> None:
    p = problem(32, 64, Grid(2, None))
    gptq = METHODS["gptq"].run(p, METHODS["gptq"].config())
    assert quip(p, QuIP()).error.sum() < 0.8 * gptq.error.sum()


def test_spqr_leave_one_out_against_a_loop_and_planted_outliers_are_found() -> None:
    torch.manual_seed(0)
    w, importance = torch.randn(4, 8), torch.rand(8) + 0.5
    gain = without_each(w, importance, 3)

    def errors(fit: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scale = (fit.max() - fit.min()) / 7
        zero = torch.round(-fit.min() / scale)
        return ((torch.round(x / scale) + zero).clamp(0, 7) - zero) * scale - x

    for r, j in itertools.product(range(4), range(8)):
        rest = [k for k in range(8) if k != j]
        want = (errors(w[r], w[r]).square() * importance).sum()
        want = want - (errors(w[r, rest], w[r, rest]).square() * importance[rest]).sum()
        assert float(gain[r, j]) == pytest.approx(float(want), abs=1e-5)
    p = problem(12, 32, Grid(3, 16))
    W = p.weight.clone()
    W[2, 5] = 4.0
    solved = spqr(Problem.of(W, p.stats, Grid(3, 16)), SpQR())
    assert solved.stored is not None
    found = set(zip(solved.stored.row.tolist(), solved.stored.column.tolist(), strict=True))  # type: ignore[attr-defined]
    assert (2, 5) in found
    without = spqr(Problem.of(W, p.stats, Grid(3, 16)), SpQR(tau=float("inf")))
    assert without.notes["outliers"] == 0 and solved.error.sum() < without.error.sum()


def test_gobo_error_falls_and_outliers_are_rare() -> None:
    torch.manual_seed(0)
    w = torch.randn(40_000) * 0.04
    table, history = centroids(w, 3, 50)
    assert history == sorted(history, reverse=True) and len(history) > 2
    assert history[-1] == pytest.approx(float((table[nearest(table, w)] - w).abs().sum()), rel=1e-4)
    assert 1e-4 < float(outliers(w, -4.0).float().mean()) < 2e-3
    grid = Grid(3, None)
    linear = Codes.round(w[None], grid.fit_all(w[None]), 3).decode()
    assert history[-1] < float((linear - w).abs().sum())


def test_bcq_holds_uniform_codes_and_its_table_product_is_the_dense_one() -> None:
    p = problem(10, 44, Grid(3, 20))
    rtn = _rtn(p)
    assert rtn.codes is not None
    assert torch.allclose(from_uniform(rtn.codes).decode(), rtn.weight, atol=1e-5)
    solved = bcq(p, BCQ())
    assert (solved.weight - p.weight).square().sum() < (rtn.weight - p.weight).square().sum()
    x = torch.randn(44)
    for width in (4, 8):
        assert torch.allclose(lut_product(solved.stored, x, width), solved.weight @ x, atol=1e-4)  # type: ignore[arg-type]


def test_known_tables() -> None:
    nf4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
           0.7230, 1]  # fmt: skip
    assert torch.allclose(normal_float(4), torch.tensor(nf4), atol=1e-4)
    assert table_of("fp4", 4).tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        want = every[torch.isfinite(every)].unique()
        assert torch.equal(table_of(name, 8), want + 0.0)
    assert table_of("power-of-two", 3).tolist() == [-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1]
    table, w = table_of("fp4", 4), torch.randn(50) * 3
    assert nearest(table, w).tolist() == [int((table - v).abs().argmin()) for v in w]


def test_codebook_errors_rank_as_published() -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 256)

    def error(name: str, bits: int = 4) -> float:
        return float((known(W, name, bits, {"mxfp4": 32, "nvfp4": 16}.get(name, 64), 1.0).decode() - W).square().mean())

    grid = Grid(4, 64, symmetric=True)
    integer = float((grid.project(W) - W).square().mean())
    assert error("nf") < integer and error("nf") < error("fp4") and error("nvfp4") < error("mxfp4")
    assert error("e4m3", 8) < error("e5m2", 8) < error("nf")
    mx = known(W, "mxfp4", 4, 32, 1.0)
    assert torch.equal(torch.log2(mx.scale), torch.log2(mx.scale).round())
    nv = known(W, "nvfp4", 4, 16, 1.0)
    block = nv.scale / nv.tensor_scale
    assert torch.allclose(block.to(torch.float8_e4m3fn).float() * nv.tensor_scale, nv.scale, rtol=1e-6)
    exact = table_of("fp4", 4).repeat(2, 2)[:, :16] * 0.5
    assert torch.equal(known(exact, "fp4", 4, 16, 1.0).decode(), exact)
    assert (known(W, "nf", 3, 64, 0.6).decode() - W).square().sum() < (
        known(W, "nf", 3, 64, 1.0).decode() - W
    ).square().sum()


def test_kmeans_is_a_fixed_point_of_lloyd() -> None:
    p = problem(3, 64, Grid(2, None))
    solved = codebook(p, Codebook("kmeans", rounds=200))
    assert solved.stored is not None
    table, values = solved.stored.table, solved.stored.values.long()  # type: ignore[attr-defined]
    for r in range(3):
        assert torch.equal(values[r], (p.weight[r][:, None] - table[r]).abs().argmin(1))
        for k in range(4):
            assert float(table[r, k]) == pytest.approx(float(p.weight[r][values[r] == k].mean()), abs=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_loftq_correction_is_the_best_of_its_rank(weighted: bool) -> None:
    p = problem(16, 24, Grid(2, 8))
    one = loftq(p, LoftQ(rank=4, rounds=1, weighted=weighted, damping=0.01))
    rest = p.weight - _rtn(p).weight
    if weighted:
        H, _ = damped(p.stats.hessian, 0.01)
        L = torch.linalg.cholesky(H)  # any root gives the same singular values
        optimum = 0.5 * torch.linalg.svdvals(rest @ L)[4:].square().sum()
        assert float(one.error.sum()) == pytest.approx(float(optimum), rel=1e-2)
    else:
        optimum = torch.linalg.svdvals(rest)[4:].square().sum()
        assert float((one.weight - p.weight).square().sum()) == pytest.approx(float(optimum), rel=1e-2)
    five = loftq(p, LoftQ(rank=4, rounds=5, weighted=weighted))
    assert five.notes["error_with"] <= one.notes["error_with"] < five.notes["error_without"]


def test_solvers_take_layers_of_different_bits() -> None:
    p = problem(12, 32)
    mixed = Problem(p.weight, p.stats, Stack(((4, Both(None, Grid(2, 16))), (8, Both(None, Grid(4, 16))))), ("a", "b"))
    for name in ("gptq-descent", "quip", "autoround", "bcq"):
        method = METHODS[name]
        parts = mixed.split(method.run(mixed, method.config()))
        alone = Problem.of(p.weight[4:], Stats.of(inputs(32)), Grid(4, 16))
        assert parts["a"].error.mean() > parts["b"].error.mean()
        assert float(parts["b"].error.sum()) == pytest.approx(float(alone.error(parts["b"].weight).sum()), rel=1e-3)


def test_a_pass_of_descent_against_a_loop_over_columns() -> None:
    torch.manual_seed(0)
    X = torch.randn(400, 140)  # more than one block of columns
    H, W = X.T @ X / 400, torch.randn(2, 140)
    shape = (2, 140)
    params = GridParams(torch.full(shape, 0.6), torch.full(shape, 2.0), torch.full(shape, 4.0))
    code = torch.randint(0, 4, shape).float()
    want = code.clone()
    for j in range(140):
        slope = ((want - 2) * 0.6 - W) @ H[:, j]
        want[:, j] = torch.round(((want[:, j] - 2) * 0.6 - slope / H[j, j]) / 0.6 + 2).clamp(0, 3)
    got = descend(W, H, code, params, None)
    assert int((got != want).sum()) <= 1  # a tie may fall either way
    assert int((got != code).sum()) > 50


def test_spqr_beside_a_wide_group_a_narrow_one_stays_finite() -> None:
    """The second level would round the narrow group's scale to 0, and its zero point to infinity."""
    W = torch.full((4, 256), 1e-6) + 1e-9 * torch.randn(4, 256)
    W[:, :16] = torch.linspace(-50, 50, 16)
    problem = Problem.of(W, Stats.of(torch.randn(300, 256)), Grid(3, 16))
    solved = spqr(problem, SpQR(tau=float("inf")))
    assert bool(torch.isfinite(solved.weight).all())
    assert float((solved.weight[:, :16] - W[:, :16]).abs().max()) < 10
