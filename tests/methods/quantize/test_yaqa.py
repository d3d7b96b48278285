"""YAQA against error feedback on the whole Kronecker product, against GPTQ, and by the error that it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lissom.core import Both, Fixed, Grid, NumericalError, Problem, Sparse, Stack, Stats, damped, side, sweep, two_sided
from lissom.methods.quantize.yaqa import YAQA, yaqa

from .problems import inputs, problem


def gram_of_outputs(rows: int, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    Y = torch.randn(200, rows, generator=g) @ torch.randn(rows, rows, generator=g)
    return Y.T @ Y / 200


def lost(p: Problem, weight: torch.Tensor, config: YAQA) -> float:
    A, _ = damped(p.stats.hessian, config.damping)
    G, _ = damped(p.extras["output_blocks"], config.damping_out)
    delta = weight - p.weight
    return float(((G @ delta @ A) * delta).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_feedback_on_the_whole_kronecker_product(masked: bool) -> None:
    """One entry after the other, each fed by all before it with the factor of the (in · out) × (in · out) Hessian."""
    n, m, group, config = 5, 12, 8, YAQA(damping=0.02, damping_out=0.3, sweeps=1)
    keep = torch.rand(n, m, generator=torch.Generator().manual_seed(4)) < 0.6 if masked else None
    p = problem(n, m, Grid(3, group), keep)
    p = replace(p, extras={"output_blocks": gram_of_outputs(n)})
    A, _ = damped(p.stats.hessian, config.damping)
    G, _ = damped(p.extras["output_blocks"], config.damping_out)
    columns, rows = A.diagonal().argsort(descending=True), G.diagonal().argsort(descending=True)
    H = torch.kron(A[columns][:, columns], G[rows][:, rows]).double()
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    U = R / R.diagonal()
    grid = p.constraint.fit_all(p.weight)
    e = torch.zeros(n * m, dtype=torch.float64)
    for at in range(n * m):
        i, j = int(rows[at % n]), int(columns[at // n])
        scale, zero = float(grid.scale[i, j // group]), float(grid.zero[i, j // group])
        w = float(p.weight[i, j])
        code = min(max(round((w + float(e[:at] @ U[:at, at])) / scale + zero), 0), 7)
        q = (code - zero) * scale if keep is None or keep[i, j] else 0.0
        e[at] = w - q
        assert float(yaqa(p, config).weight[i, j]) == pytest.approx(q, abs=1e-6), (i, j)


def test_with_outputs_alike_it_is_gptq_in_activation_order() -> None:
    p = problem(24, 64, Grid(3, 32))
    whitened = replace(p, extras={"output_blocks": 7 * torch.eye(24)})
    theirs = sweep(p, p.factor(0.01, True), static_groups=True).weight
    for alike in (p, whitened):
        assert torch.equal(yaqa(alike, YAQA(sweeps=1)).weight, theirs)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loss_of_the_model_falls_and_the_error_of_the_layer_rises(bits: int) -> None:
    mine = gptq = 0.0
    for seed in range(4):
        config = YAQA(damping_out=0.01, sweeps=1)
        p = replace(problem(32, 64, Grid(bits, 32), seed=seed), extras={"output_blocks": gram_of_outputs(32, seed)})
        solved, plain = yaqa(p, config), sweep(p, p.factor(0.01, True), static_groups=True)
        mine, gptq = mine + lost(p, solved.weight, config), gptq + lost(p, plain.weight, config)
        assert solved.error.sum() > plain.error.sum()
    assert mine < 0.9 * gptq


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_second_sweep_goes_by_scales_that_fit_the_codes_of_the_first(symmetric: bool) -> None:
    errors = torch.zeros(3)
    for seed in range(4):
        p = problem(16, 48, Grid(3, 16, symmetric), seed=seed)
        solved = [yaqa(p, YAQA(sweeps=n)) for n in (1, 2, 3)]
        errors += torch.stack([s.error.sum() for s in solved])
        codes = solved[1].codes
        assert codes is not None and torch.equal(codes.scale, codes.scale.half().float())
        assert codes.symmetric or not symmetric
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_layers_of_a_stack_are_solved_each_with_its_own_bits_and_outputs() -> None:
    """The narrower one's matrix is padded; the wider one's outputs come in two blocks that know nothing of each other."""
    W = problem(12, 32).weight
    stats, G = Stats.of(inputs(32)), [gram_of_outputs(n) for n in (2, 5, 5)]
    grids = (2, Both(None, Grid(2, 16))), (10, Both(Sparse(0.5), Grid(4, 16)))
    mask = grids[1][1].pattern.select(W[2:].abs())
    grids = grids[0], (10, Both(Fixed(mask), Grid(4, 16)))
    blocks = torch.cat([torch.nn.functional.pad(g, (0, 5 - len(g))) for g in G])
    whole = yaqa(Problem(W, stats, Stack(grids), ("a", "b"), extras={"output_blocks": blocks}), YAQA())
    for place, part, gram in (
        (slice(0, 2), grids[0][1], G[0]),
        (slice(2, 7), Both(Fixed(mask[:5]), Grid(4, 16)), G[1]),
        (slice(7, 12), Both(Fixed(mask[5:]), Grid(4, 16)), G[2]),
    ):
        stack = Stack(((place.stop - place.start, part),))
        alone = yaqa(Problem(W[place], stats, stack, extras={"output_blocks": gram}), YAQA())
        assert torch.equal(whole.weight[place], alone.weight)
    assert whole.codes is not None and int(whole.codes.values[:2].max()) <= 3
    assert int((whole.weight[2:] == 0).sum()) >= 10 * 16


def test_a_row_of_outputs_that_never_matter_and_a_dead_input_stay_finite() -> None:
    X = inputs(24)
    X[:, 5] = 0
    G = gram_of_outputs(6)
    G[2], G[:, 2] = 0, 0
    p = Problem.of(torch.randn(6, 24), Stats.of(X), Grid(4, 8), extras={"output_blocks": G})
    solved = yaqa(p, YAQA())
    assert bool(torch.isfinite(solved.weight).all()) and bool((solved.weight[:, 5] == 0).all())
    assert float((solved.weight - p.weight)[2, torch.arange(24) != 5].abs().max()) < 0.6


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        side(torch.full((3, 3), float("nan")), 0.01)


def test_what_is_dropped_gets_the_code_of_zero() -> None:
    keep = torch.arange(8 * 16).reshape(8, 16) % 3 > 0
    p = problem(8, 16, Grid(3, 8), None)
    grid = replace(p, constraint=Stack(((8, Both(Fixed(keep), Grid(3, 8))),))).constraint.fit_all(p.weight)
    codes = two_sided(p.weight, side(p.stats.hessian, 0.01), side(gram_of_outputs(8), 1.0), grid, 8, keep)
    zero = grid.zero.repeat_interleave(8, 1)
    assert torch.equal(codes[~keep].float(), zero[~keep]) and not torch.equal(codes[keep].float(), zero[keep])
