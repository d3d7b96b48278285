"""Scores by hand and by naive loops: RIA, E-Sparse, ISC, GBLM, OBD; and permutations that never retain less."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import NM, Problem, Sparse, Stats, damped, histogram_entropy
from lissom.methods.prune.e_sparse import ESparse, channel_weight, e_sparse, gaussian_entropy
from lissom.methods.prune.gblm import GBLM, gblm
from lissom.methods.prune.isc import ISC, isc
from lissom.methods.prune.obd import LOBD, OBD, l_obd, obd
from lissom.methods.prune.permute import assign, retained, swap, zigzag
from lissom.methods.prune.ria import RIA, ria, ria_score
from lissom.methods.prune.sparsegpt import SparseGPT, sparsegpt
from lissom.methods.prune.wanda import Wanda, wanda


def make(rows=8, columns=16, seed=0, **extras):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, columns, generator=g) * torch.rand(columns, generator=g).add(0.1)
    W = torch.randn(rows, columns, generator=g)
    return Problem.of(W, Stats.of(X), Sparse(0.5), extras=extras), X


def test_ria_by_a_naive_loop():
    problem, X = make()
    W = problem.weight
    expected = torch.zeros_like(W)
    for r in range(8):
        for c in range(16):
            row = sum(abs(float(W[r, k])) for k in range(16))
            column = sum(abs(float(W[k, c])) for k in range(8))
            a = abs(float(W[r, c]))
            expected[r, c] = (a / row + a / column) * float(X[:, c].norm()) ** 0.5
    torch.testing.assert_close(ria_score(W, problem.stats.norm, 0.5), expected)
    assert torch.equal(ria(problem, RIA()).mask, Sparse(0.5).select(expected))


def test_ria_ignores_the_scale_of_a_stacked_neighbour():
    problem, _ = make()
    double = dataclasses.replace(problem, weight=torch.cat([problem.weight, 100 * problem.weight]))
    parts = problem.constraint.parts * 2
    double = dataclasses.replace(double, constraint=type(problem.constraint)(parts), names=("a", "b"))
    mask = ria(double, RIA()).mask
    assert torch.equal(mask[:8], ria(problem, RIA()).mask) and torch.equal(mask[8:], mask[:8])


def test_histogram_entropy_by_hand():
    X = torch.tensor([[0.0, 0.0], [0.1, 1.0], [9.9, 2.0], [10.0, 3.0]])
    two_bins, flat = histogram_entropy(lambda: [X[:1], X[1:]], 4).tolist()  # the range is that of all batches
    assert two_bins == pytest.approx(math.log(2)) and flat == pytest.approx(math.log(4))


def test_the_gaussian_entropy_is_near_the_histogram_for_gaussian_inputs():
    X = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 5.0, 100.0])
    torch.testing.assert_close(
        gaussian_entropy(Stats.of(X), 100), histogram_entropy(lambda: [X], 100), rtol=0.03, atol=0.0
    )


def test_e_sparse_with_large_alpha_is_wanda_and_uses_a_given_entropy():
    problem, _ = make()
    assert torch.equal(e_sparse(problem, ESparse(alpha=1e9)).mask, wanda(problem, Wanda()).mask)
    flat = dataclasses.replace(problem, stats=dataclasses.replace(problem.stats, entropy=torch.ones(16)))
    assert torch.equal(e_sparse(flat, ESparse(alpha=0)).mask, Sparse(0.5).select(problem.weight.abs()))


def test_e_sparse_by_hand_and_however_many_tokens_were_seen():
    X = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
    expected = torch.tensor([1.0 + 3 * math.sqrt(2048), 2.0 + math.sqrt(2048)])
    for times in (1, 50):
        stats = dataclasses.replace(Stats.of(X.repeat(times, 1)), entropy=torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(channel_weight(stats, ESparse()), expected)


def test_isc_without_obd_is_sparsegpt_and_with_it_the_mixed_score():
    problem, _ = make()
    a, b = isc(problem, ISC(obd=0)), sparsegpt(problem, SparseGPT())
    assert torch.equal(a.weight, b.weight)
    d = problem.factor().diagonal
    H, _ = damped(problem.stats.hessian, 0.01)
    W = problem.weight
    score = W**2 / (2 * d**2) + 0.5 * W**2 * H.diagonal()
    assert torch.equal(
        isc(problem, ISC()).mask, Sparse(0.5).select(score)
    )  # one block of 16 columns: before any update


def test_gblm_with_constant_gradients_is_wanda_and_any_scale_of_them_is_the_same():
    problem, _ = make(gradient=torch.ones(8, 16) * 3)
    assert torch.equal(gblm(problem, GBLM(beta=1e-6)).mask, wanda(problem, Wanda()).mask)
    g = torch.rand(8, 16, generator=torch.Generator().manual_seed(3))
    one, other = (gblm(dataclasses.replace(problem, extras={"gradient": s * g}), GBLM()).mask for s in (1.0, 1000.0))
    assert torch.equal(one, other)
    alone = gblm(dataclasses.replace(problem, extras={"gradient": g}), GBLM(activation=False)).mask
    assert torch.equal(alone, Sparse(0.5).select(problem.weight.abs() * g))


def test_obd_and_l_obd():
    fisher = torch.rand(8, 16, generator=torch.Generator().manual_seed(1))
    problem, X = make(fisher=fisher)
    W = problem.weight
    assert torch.equal(obd(problem, OBD()).mask, Sparse(0.5).select(fisher * W**2))
    assert torch.equal(l_obd(problem, LOBD()).mask, Sparse(0.5).select(W**2 * X.square().mean(0)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(2, 4), (4, 8), (1, 4), (4, 4)]))
def test_no_shuffle_retains_less(seed, nm):
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(6, 24, generator=g) * torch.rand(24, generator=g).exp()
    begin = torch.arange(24)
    for start in (begin, zigzag(score, m)):
        before = retained(score[:, start], n, m)
        for order in (assign(score, n, m, start), swap(score, n, m, start, block=12)):
            assert sorted(order.tolist()) == list(range(24))
            assert retained(score[:, order], n, m) >= before - 1e-6


def test_zigzag_by_hand_and_its_gain_on_clustered_columns():
    score = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    # columns by strength dealt to two groups: 0 1 | 3 2 | 4 5 | 7 6
    assert zigzag(score, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    strong = torch.ones(4, 16) * 0.1
    strong[:, :4] = 1.0  # all strong columns share a group: 2:4 must drop two of them
    order = zigzag(strong, 4)
    assert retained(strong[:, order], 2, 4) > retained(strong, 2, 4) * 1.3
    assert bool(NM(2, 4).select(strong[:, order])[:, (order < 4)].all())


def test_assignment_finds_the_best_of_all_single_moves():
    score = torch.rand(3, 8, generator=torch.Generator().manual_seed(2))
    best = retained(score[:, assign(score, 2, 4, torch.arange(8), rounds=5)], 2, 4)
    # two groups: exchanging the columns of one position cannot improve a fixed point
    order = assign(score, 2, 4, torch.arange(8), rounds=5).reshape(2, 4)
    for position in range(4):
        trial = order.clone()
        trial[:, position] = order[:, position].flip(0)
        assert retained(score[:, trial.reshape(-1)], 2, 4) <= best + 1e-6
