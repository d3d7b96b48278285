"""Gaps of learned gates against naive loops; the half-space projection; the random baseline."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import GateProblem, UnitProblem, Units
from lissom.methods.structured import factor, widths
from lissom.methods.structured.compresso import Compresso, compresso
from lissom.methods.structured.head_gates import HeadGates, head_gates
from lissom.methods.structured.l0 import L0, l0
from lissom.methods.structured.lorashear import LoRAShear, lorashear
from lissom.methods.structured.random_units import RandomUnits, random_units
from lissom.methods.structured.sheared import Sheared, sheared


def _gates(seed=0, kinds=("heads", "neurons", "blocks", "channels"), progress=0.3):
    g = torch.Generator().manual_seed(seed)
    shape = {"heads": (2, 3), "neurons": (2, 4), "blocks": (2,), "channels": (5,)}
    opened = {k: torch.rand(*shape[k], generator=g) for k in kinds}
    keep = {"heads": 2 / 3, "neurons": 0.5, "blocks": 0.5, "channels": 0.8}
    return GateProblem(opened, {k: keep[k] for k in kinds}, {"heads": 10, "neurons": 3}, progress)


@pytest.mark.parametrize("progress, share", [(0.0, 0.0), (0.15, 0.5), (0.3, 1.0), (1.0, 1.0)])
def test_l0_by_hand(progress, share):
    problem = _gates(kinds=("heads", "neurons"), progress=progress)
    left = sum(10 * float(x) for x in problem.open["heads"].flatten())
    left += sum(3 * float(x) for x in problem.open["neurons"].flatten())
    target = 1 - (10 * 6 * 2 / 3 + 3 * 8 * 0.5) / 84
    assert l0(problem, L0(ramp=0.3)).tolist() == pytest.approx([1 - left / 84 - share * target], abs=1e-5)


def test_head_gates_cost_their_probability():
    problem = _gates(kinds=("heads",))
    assert head_gates(problem, HeadGates()).tolist() == problem.open["heads"].flatten().tolist()


def test_sheared_has_one_gap_for_every_dimension():
    problem = _gates()
    expected = [1 - float(problem.open["blocks"].mean()) - 0.5, 1 - float(problem.open["channels"].mean()) - 0.2]
    expected += [1 - sum(row) / 3 - 1 / 3 for row in problem.open["heads"].tolist()]
    expected += [1 - sum(row) / 4 - 0.5 for row in problem.open["neurons"].tolist()]
    assert sheared(problem, Sheared(ramp=0.3)).tolist() == pytest.approx(expected, abs=1e-6)


def test_compresso_holds_units_and_channels_apart():
    problem = _gates(kinds=("heads", "neurons", "channels"))
    units = GateProblem({k: problem.open[k] for k in ("heads", "neurons")}, problem.keep, problem.size, 0.3)
    found = compresso(problem, Compresso(ramp=0.3)).tolist()
    assert found[0] == pytest.approx(float(l0(units, L0(ramp=0.3))[0]), abs=1e-6)
    assert found[1] == pytest.approx(1 - float(problem.open["channels"].mean()) - 0.2, abs=1e-6)
    assert len(compresso(units, Compresso())) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), open_block=st.floats(0, 1))
def test_gaps_vanish_at_the_target_and_fall_where_gates_open(seed, open_block):
    problem = _gates(seed, kinds=("heads", "neurons"))
    exact = {k: torch.full_like(o, problem.keep[k]) for k, o in problem.open.items()}
    for run, config in ((l0, L0()), (sheared, Sheared()), (compresso, Compresso())):
        there = run(GateProblem(exact, problem.keep, problem.size, 1.0), config)
        assert float(there.abs().max()) < 1e-6
        wider = {k: o + (1 - o) * 0.5 for k, o in problem.open.items()}
        gaps = [run(GateProblem(o, problem.keep, problem.size, 1.0), config) for o in (problem.open, wider)]
        assert bool((gaps[1] < gaps[0]).all())


def test_a_step_that_turns_round_crosses_the_half_space_by_hand():
    before = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    trial = torch.tensor([[3.0, 3.9], [-1.0, 0.5], [0.3, 0.3], [0.0, 0.0]])
    # ⟨trial, x⟩ = 24.6, −1, 2.1 against ε ‖x‖² = 2.5; a unit at zero stays where it is
    assert lorashear(before, trial, LoRAShear(epsilon=0.1)).tolist() == [False, True, True, False]
    assert lorashear(before, trial, LoRAShear(epsilon=0.0)).tolist() == [False, True, False, False]


@settings(max_examples=30, deadline=None)
@given(progress=st.floats(0, 1), periods=st.integers(1, 6), ramp=st.floats(0.1, 1))
def test_units_shrink_in_their_order_and_are_gone_at_the_end_of_the_ramp(progress, periods, ramp):
    config = LoRAShear(periods=periods, ramp=ramp)
    rank = torch.arange(12) / 12
    z = factor(rank, progress, config)
    assert bool((z.diff() >= 0).all()) and 0 <= float(z.min()) and float(z.max()) <= 1
    assert bool((factor(rank, 0.0, config) == 1).all())
    assert float(factor(rank, min(ramp * 1.0001, 1.0), config).max()) < 1e-3


def test_factors_by_hand():
    config = LoRAShear(periods=2, ramp=1.0)
    assert factor(torch.tensor([0.0, 0.5]), 0.25, config).tolist() == [0.5, 1.0]
    assert factor(torch.tensor([0.0, 0.5]), 0.75, config).tolist() == [0.0, 0.5]


def test_random_units_depend_on_seed_block_and_kind_only():
    index = torch.arange(400)[:, None]
    units = Units("neurons", {"up": index}, {"down": index}, 2)

    def scores(seed=0, block=0, scale=1.0):
        weights = {"up": torch.full((400, 3), scale), "down": torch.ones(3, 400)}
        return random_units(UnitProblem(units, weights, block=block), RandomUnits(seed=seed))

    assert torch.equal(scores(), scores(scale=9.0))
    assert not torch.equal(scores(), scores(seed=1)) and not torch.equal(scores(), scores(block=1))
    ranks = scores().argsort().argsort().double()
    assert abs(float(torch.corrcoef(torch.stack((ranks, torch.arange(400).double())))[0, 1])) < 4 / math.sqrt(400)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: L0(steps=0), "must be at least 1"),
        (lambda: L0(gate_rate=0.0), "must be positive"),
        (lambda: L0(text=0.0), "one must be positive"),
        (lambda: HeadGates(penalty=0.0), "penalty must be positive"),
        (lambda: HeadGates(keep_neurons=0.5), "only heads have gates"),
        (lambda: Sheared(domains=("a",), data="b"), "not both"),
        (lambda: LoRAShear(epsilon=1.0), "epsilon must be in"),
        (lambda: LoRAShear(weights="all"), 'weights "lora"'),
    ],
)
def test_settings_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), blocks=st.integers(1, 5), mean=st.integers(1, 9), extra=st.integers(0, 4))
def test_widths_have_their_mean_exactly_and_stay_within_bounds(seed, blocks, mean, extra):
    high = min(10, mean + extra)
    scores = (
        torch.rand(blocks, 10, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, blocks + 1)[:, None]
    )
    found = widths(scores, mean, high)
    assert sum(found) == mean * blocks and max(found) <= high and min(found) >= max(1, 2 * mean - high)


def test_widths_by_hand():
    # standardised: (1.5, −.5, −.5, −.5) twice as sharp as nothing; (1.2, .4, −.4, −1.2)/…
    scores = torch.tensor([[9.0, 1.0, 1.0, 1.0], [400.0, 300.0, 200.0, 100.0]])
    z = [[(x - sum(r) / 4) / torch.tensor(r).std().item() for x in r] for r in scores.tolist()]
    best = sorted(((v, b) for b, row in enumerate(z) for v in row), reverse=True)[:4]
    assert widths(scores, 2, 4) == [sum(b == i for _, b in best) for i in range(2)] == [1, 3]
    assert widths(scores, 2, 2) == [2, 2]
