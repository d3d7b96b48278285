"""Forms: exact merges, masks and grids that hold, gates that reach their ends; schedules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import NM, Both, Grid, Problem, Sparse, Stats
from lissom.methods.heal.legal import Legal
from lissom.train import Gated, Gradual, HardConcrete, Latent, LoRA, solved_of
from lissom.train.schedules import cubic, rate, rewound


def _solved(constraint, seed=0):
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    return Problem.of(W, Stats.empty(16, gram=False), constraint).project(W.abs())


@pytest.mark.parametrize("constraint", [None, Sparse(0.6), Grid(4, 8), Both(NM(2, 4), Grid(3, 16))], ids=str)
@pytest.mark.parametrize("kind", ["latent", "lora"])
def test_training_sees_what_is_stored(constraint, kind):
    solved = _solved(constraint)
    legal = Legal.of(solved)
    form = Latent.of(solved) if kind == "latent" else LoRA(solved.weight, 2, 4.0, legal)
    assert torch.allclose(form.weight(), solved.weight, atol=1e-6)  # starts where the solver ended
    optimiser = torch.optim.Adam(form.leaves().values(), lr=0.05)
    target = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    first = None
    for _ in range(20):
        loss = (form.weight() - target).square().mean()
        first = first or float(loss)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < first
    new = solved_of(form, solved)
    assert torch.allclose(form.weight(), form.final(), atol=1e-5) and torch.equal(form.final(), new.weight)
    if solved.mask is not None:
        assert not new.weight[~solved.mask].any()
    if solved.codes is not None:
        assert torch.equal(new.codes.decode(), new.weight) and torch.equal(new.codes.scale, solved.codes.scale)


def test_lora_trains_few_numbers_and_leaves_its_base_alone():
    base = torch.randn(6, 16)
    form = LoRA(base.clone(), rank=2)
    assert sum(t.numel() for t in form.leaves().values()) == 2 * (6 + 16)
    with torch.no_grad():
        form.B.normal_()
    assert torch.equal(form.base, base)
    assert torch.allclose(form.final(), base + 8 * form.B @ form.A)
    with pytest.raises(ValueError, match="rank must be 1 … 6"):
        LoRA(base, rank=7)


def test_hard_concrete_gates_by_hand():
    gates = HardConcrete(torch.tensor([-8.0, 0.0, 8.0]))
    assert gates.value().tolist() == pytest.approx([0, 0.5, 1])
    by_hand = [1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1)))) for a in (-8, 0, 8)]
    assert gates.open().tolist() == pytest.approx(by_hand, abs=1e-6)
    assert HardConcrete.start(3, 0.9).open().tolist() == pytest.approx([0.9] * 3, abs=1e-5)


def test_the_probability_of_an_open_gate_is_what_sampling_gives():
    gates = HardConcrete(torch.full((20_000,), -0.7))
    gates.sample(torch.Generator().manual_seed(0))
    share = float((gates.value() > 0).float().mean())
    assert share == pytest.approx(float(gates.open()[0]), abs=0.015)
    gates.settle()
    assert gates.value().unique().numel() == 1


def test_gated_inputs_are_scaled_and_a_closed_gate_removes_them():
    gates = HardConcrete(torch.tensor([20.0, -20.0]))
    form = Gated(Latent(torch.ones(3, 4)), gates, torch.tensor([0, 0, 1, 1]))
    assert form.final().tolist() == [[1, 1, 0, 0]] * 3
    form.weight().sum().backward()
    assert set(form.leaves()) == {"value", "log_alpha"}


@settings(max_examples=30)
@given(warmup=st.floats(0, 0.9), shape=st.sampled_from(["cosine", "linear", "constant"]), floor=st.floats(0, 1))
def test_rates_end_at_their_floor_and_never_leave_zero_to_one(warmup, shape, floor):
    values = [rate(p / 50, warmup, shape, floor) for p in range(51)]
    assert all(-1e-9 <= v <= 1 + 1e-9 for v in values)
    assert values[-1] == pytest.approx(1 if shape == "constant" else floor, abs=1e-6)


def test_rate_and_cubic_by_hand():
    assert rate(0.05, 0.1) == pytest.approx(0.5) and rate(0.1, 0.1) == pytest.approx(1)
    assert rate(0.55, 0.1) == pytest.approx(0.5)
    assert cubic(0, 0.8) == 0 and cubic(1, 0.8) == pytest.approx(0.8)
    assert cubic(0.5, 0.8, initial=0.2) == pytest.approx(0.8 - 0.6 / 8)
    assert cubic(0.1, 0.8, start=0.2) == 0 and cubic(0.9, 0.8, stop=0.5) == pytest.approx(0.8)
    assert rewound(0, 0.6) == 0.6 and rewound(1, 0.6) == 1


def test_masks_of_a_gradual_pruning_by_hand():
    forms = {"a": Latent(torch.tensor([[1.0, -8.0, 3.0, 5.0, 2.0, -7.0, 4.0, 6.0]]))}
    gradual = Gradual(forms, 0.75, updates=2, rise=0.5)
    zeros = []
    for progress in (0.0, 0.2, 0.25, 0.4, 0.5, 0.9):
        gradual.step(0, progress)
        zeros.append(int((forms["a"].weight() == 0).sum()))
    assert zeros == [0, 0, 5, 5, 6, 6]  # 0.75 (1 − 0.5³) = 0.656 of 8 after half of the rise
    assert forms["a"].weight().tolist() == [[0, -8, 0, 0, 0, -7, 0, 0]]
    half = Latent(torch.arange(1.0, 9.0)[None], Legal(torch.tensor([[False] * 4 + [True] * 4]), None))
    Gradual({"b": half}, 0.75, updates=1, rise=1.0).step(0, 1.0)
    assert half.weight().tolist() == [[0] * 6 + [7, 8]]
    assert not gradual.leaves()["a:mask"].is_floating_point()
