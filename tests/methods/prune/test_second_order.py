"""OBS, L-OBS, LLM Surgeon against brute force and constrained least squares; DSnoT and OATS against their laws."""

import dataclasses
import itertools

import pytest
import torch

from lissom.core import NM, LowRank, NMByRow, Plain, Problem, RecipeError, Sparse, Stats, damped
from lissom.methods.prune.dsnot import DSnoT, dsnot, exchange, group_of
from lissom.methods.prune.l_obs import LOBS, l_obs, removal_losses
from lissom.methods.prune.oats import OATS, decompose, oats
from lissom.methods.prune.obd import LOBD, OBD, l_obd, obd
from lissom.methods.prune.obs import OBS, fisher_blocks, obs
from lissom.methods.prune.sparsegpt import SparseGPT, sparsegpt
from lissom.methods.prune.surgeon import Surgeon, joint_update, surgeon, unit_costs
from lissom.methods.prune.wanda import Wanda, wanda


def make(rows=6, columns=12, seed=0, constraint=None, **extras):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(200, columns, generator=g) @ torch.randn(columns, columns, generator=g) + 0.5
    W = torch.randn(rows, columns, generator=g)
    return Problem.of(W, Stats.of(X), constraint or Sparse(0.5), extras=extras)


def constrained(w, H, keep):
    """min ½ (x − w) H (x − w) over x supported on ``keep``, in double precision; the loss and x."""
    x = torch.zeros_like(w)
    x[keep] = torch.linalg.solve(H[keep][:, keep], (H @ w)[keep])
    return float(0.5 * (x - w) @ H @ (x - w)), x


def test_l_obs_is_brute_force_greedy():
    problem = make(rows=3, columns=8)
    H = damped(problem.stats.hessian, 0.01)[0]
    losses = removal_losses(H, problem.weight)
    for r in range(3):
        left, w, total, worst = list(range(8)), problem.weight[r].double(), 0.0, 0.0
        for _ in range(6):
            trials = [constrained(w, H.double(), torch.tensor([k for k in left if k != q]))[0] for q in left]
            q = left[min(range(len(left)), key=lambda i: trials[i])]
            worst = max(worst, min(trials) - total)
            assert float(losses[r, q]) == pytest.approx(worst, rel=1e-2, abs=1e-4)
            total = min(trials)
            left.remove(q)


def test_l_obs_reaches_a_smaller_error_than_sparsegpt_and_obd():
    problem = make(20, 24)
    exact, sweep, diagonal = (
        f(problem, c).error.sum() for f, c in ((l_obs, LOBS()), (sparsegpt, SparseGPT()), (l_obd, LOBD()))
    )
    assert exact < sweep < diagonal


def test_block_fisher_obs_is_the_constrained_optimum_of_each_block():
    samples = torch.randn(30, 4, 10, generator=torch.Generator().manual_seed(1))
    problem = make(4, 10, samples=samples)
    solved = obs(problem, OBS(block=5, damping=0.1))
    F = fisher_blocks(samples, OBS(block=5, damping=0.1)).double()
    for r in range(4):
        for b in range(2):
            columns = slice(5 * b, 5 * b + 5)
            keep = solved.mask[r, columns].nonzero()[:, 0]
            _, expected = constrained(problem.weight[r, columns].double(), F[r, b], keep)
            torch.testing.assert_close(solved.weight[r, columns].double(), expected, rtol=1e-3, atol=1e-4)


def test_the_fisher_of_a_width_that_blocks_do_not_divide():
    samples = torch.randn(9, 2, 7, generator=torch.Generator().manual_seed(1))
    F = fisher_blocks(samples, OBS(block=4, damping=0, shrink=0))
    torch.testing.assert_close(F[1, 1, :3, :3], torch.einsum("ni,nj->ij", samples[:, 1, 4:], samples[:, 1, 4:]) / 9)
    assert F.shape == (2, 2, 4, 4)


def test_few_gradients_leave_the_order_to_the_diagonal_and_not_to_magnitude():
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(-1, 1, 20)  # what a weight's gradient is worth
    samples = torch.randn(2, 8, 20, generator=generator) * scale
    problem = make(8, 20, samples=samples)
    by_diagonal = obd(make(8, 20, fisher=samples.square().mean(0)), OBD()).mask

    def agrees(shrink: float | None) -> float:
        mask = obs(problem, OBS(block=20, damping=1e-6, shrink=shrink, update=False)).mask
        return float((mask == by_diagonal).float().mean())

    assert agrees(1.0) == 1
    assert agrees(None) > 0.9 > agrees(0.0)


def test_shrinking_keeps_the_diagonal_and_scales_the_rest():
    samples = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(1))
    F, S = (fisher_blocks(samples, OBS(block=4, damping=0, shrink=s)) for s in (None, 0))
    eye = torch.eye(4, dtype=torch.bool).expand_as(S)
    torch.testing.assert_close(F[eye], S[eye])
    torch.testing.assert_close(F[~eye], S[~eye] * 6 / 10)


def kronecker_oracle(W, mask, A, G):
    """The same optimum by the full (out·in) system."""
    F = torch.kron(G.contiguous(), A.contiguous()).double()
    return constrained(W.reshape(-1).double(), F, mask.reshape(-1).nonzero()[:, 0])[1].reshape(W.shape)


def surgeon_problem(constraint, rows=6, columns=10):
    outputs = torch.randn(40, rows, generator=torch.Generator().manual_seed(4)) @ torch.randn(rows, rows)
    return make(rows, columns, constraint=constraint, output_gram=outputs.T @ outputs / 40)


UNITS = {"element": (1, 1), "row": (1, 0), "column": (0, 1)}


@pytest.mark.parametrize("unit", UNITS)
def test_surgeon_updates_to_the_joint_optimum(unit):
    torch.manual_seed(0)
    problem = surgeon_problem(Sparse(0.5, unit=UNITS[unit]))
    solved = surgeon(problem, Surgeon(steps=1, tolerance=1e-6))
    A, _ = damped(problem.stats.hessian / 2, 0.01)
    G, _ = damped(problem.extras["output_gram"], 0.1)
    expected = kronecker_oracle(problem.weight, solved.mask, A, G)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-2, atol=1e-3)
    if unit == "row":
        assert int((~solved.mask).all(1).sum()) == 3
    if unit == "column":
        assert int((~solved.mask).all(0).sum()) == 5


def test_surgeon_costs_are_the_loss_of_removing_one_unit():
    torch.manual_seed(1)
    problem = surgeon_problem(Sparse(0.5), 4, 5)
    A, _ = damped(problem.stats.hessian / 2, 0.01)
    G, _ = damped(problem.extras["output_gram"], 0.1)
    inverses = torch.linalg.inv(A).diagonal(), torch.linalg.inv(G).diagonal()
    for unit, gone in (("element", (2, 3)), ("row", (1, slice(None))), ("column", (slice(None), 4))):
        mask = torch.ones(4, 5, dtype=torch.bool)
        mask[gone] = False
        delta = kronecker_oracle(problem.weight, mask, A, G) - problem.weight
        loss = 0.5 * torch.trace(G.double() @ delta @ A.double() @ delta.T)
        cost = unit_costs(problem.weight, A, G, *inverses, UNITS[unit])[gone].sum()
        assert float(cost) == pytest.approx(float(loss), rel=1e-2)


def test_surgeon_with_white_outputs_scores_as_l_obs_and_shots_help():
    problem = dataclasses.replace(make(30, 24), extras={"output_gram": torch.eye(30)})
    one, many = (surgeon(problem, Surgeon(steps=s)).error.sum() for s in (1, 12))
    assert many < one
    first = removal_losses(damped(problem.stats.hessian, 0.01)[0], problem.weight).amin(1)
    A = damped(problem.stats.hessian / 2, 0.01)[0]
    costs = unit_costs(problem.weight, A, torch.eye(30), torch.linalg.inv(A).diagonal(), torch.ones(30), (1, 1))
    torch.testing.assert_close(2 * costs.amin(1), first, rtol=1e-3, atol=1e-5)  # H = 2A


def test_joint_update_without_removals_changes_nothing():
    W = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    full = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(joint_update(W, full, torch.eye(4), torch.eye(3), 1e-6, 9, W), W)


@pytest.mark.parametrize("pattern", [Sparse(0.6, "row"), NM(2, 4)])
def test_dsnot_lowers_the_mean_error_and_keeps_the_pattern(pattern):
    problem = make(40, 16, constraint=pattern)
    start = wanda(problem, Wanda())
    solved = dsnot(problem.then(start), DSnoT(tolerance=0.01))
    mean = problem.stats.mean

    def r(mask):
        return (problem.weight * ~mask @ mean).abs()

    assert torch.equal(solved.mask.sum(1), start.mask.sum(1)) and not torch.equal(solved.mask, start.mask)
    assert bool((r(solved.mask) <= r(start.mask) + 1e-6).all()) and r(solved.mask).sum() < 0.7 * r(start.mask).sum()
    if isinstance(pattern, NM):
        assert bool((solved.mask.reshape(40, -1, 4).sum(2) == 2).all())
    assert torch.equal(
        dsnot(problem, DSnoT(tolerance=0.01)).mask, solved.mask
    )  # as the first step: the same from Wanda


def test_one_dsnot_exchange_by_hand():
    # removed: 2 and 3 with pulls 3 and −1, so r = 2; growing 2 leaves −1; pruning 0 (pull +0.5, weakest) leaves −0.5
    W = torch.tensor([[0.5, 2.0, 3.0, -1.0]])
    mask = torch.tensor([[True, True, False, False]])
    ones = torch.ones(4)
    out = exchange(W, mask, ones, ones, ones, None, DSnoT(cycles=1))
    assert out.tolist() == [[False, True, True, False]]


def test_the_group_of_a_mask():
    mask = NM(2, 4).select(torch.rand(6, 16))
    assert group_of(mask) == 4
    mask[0, 0] = not mask[0, 0]
    assert group_of(mask) is None
    assert group_of(NMByRow(0.6, 16).select(torch.rand(40, 64))) == 16
    assert group_of(Sparse(0.6).select(torch.rand(40, 64))) is None


def test_oats_without_factors_is_wanda_and_with_them_spends_the_same():
    g = torch.Generator().manual_seed(0)
    W = (
        (torch.randn(30, 6, generator=g) @ torch.randn(6, 40, generator=g) + 0.3 * torch.randn(30, 40, generator=g))
        .half()
        .float()
    )
    stats = Stats.of(torch.randn(300, 40, generator=g) * torch.rand(40, generator=g).add(0.2))
    problem = Problem.of(W, stats, Sparse(0.5, "row"))
    plain = oats(problem, OATS(rank_share=0))
    assert torch.equal(plain.weight, wanda(problem, Wanda()).weight)
    solved = oats(problem, OATS(rank_share=0.3))
    form = solved.stored.parts[0][1]
    assert isinstance(form, LowRank) and isinstance(form.base, Plain)
    spent = int((form.base.weight != 0).sum()) + form.A.numel() + form.B.numel()
    rank = form.A.shape[1]
    assert rank == int(0.3 * 600 / 70) and spent == pytest.approx(600, abs=70 + 30)  # one rank, one entry per row
    assert solved.error.sum() < 0.9 * plain.error.sum()


def test_each_oats_alternation_lowers_the_error():
    g = torch.Generator().manual_seed(1)
    M = torch.randn(20, 4, generator=g) @ torch.randn(4, 24, generator=g) + 0.5 * torch.randn(20, 24, generator=g)
    errors = []
    for n in (1, 2, 4, 16, 64):
        S, P, Q = decompose(M, Sparse(0.7, "row"), 4, n, 0)
        errors.append(float((M - S - P @ Q.T).norm()))
    assert all(a >= b - 1e-4 for a, b in itertools.pairwise(errors)) and errors[-1] < 0.95 * errors[0]


def test_oats_refuses_a_grid_by_name():
    from lissom.core import Both, Grid

    with pytest.raises(RecipeError, match="leave out `bits`"):
        oats(make(constraint=Both(Sparse(0.5), Grid(4))), OATS())
