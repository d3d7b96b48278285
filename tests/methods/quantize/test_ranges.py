"""Ranges, fake quantization and integer-only arithmetic against loops and laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.methods.quantize import ranges
from lissom.methods.quantize.activations import (
    ActivationGrid,
    calibrated,
    dyadic,
    fake_activation,
    integer_linear,
    requantize,
)  # fmt: skip


@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_fake_quantization_laws(seed: int, bits: int, symmetric: bool) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 10
    bounds = ranges.absmax(x) if symmetric else ranges.minmax(x)
    scale, zero = ranges.grid(*bounds, bits, symmetric)
    y = ranges.fake(x, scale, zero, bits, symmetric)
    assert torch.allclose(ranges.fake(y, scale, zero, bits, symmetric), y, atol=1e-4)  # idempotent
    slack = 1.0 if not symmetric else 0.5  # rounding the zero point moves the affine interval by up to half a step
    assert bool(((x - y).abs() <= slack * scale * 1.001 + 1e-6).all())
    assert bool((ranges.fake(torch.zeros_like(x), scale, zero, bits, symmetric) == 0).all())


@pytest.mark.parametrize("per", ["tensor", "row", "column", "group", "block"])
def test_split_and_join(per: str) -> None:
    x = torch.arange(96.0).reshape(8, 12)
    y = ranges.split(x, per, 4)  # type: ignore[arg-type]
    assert torch.equal(ranges.join(y, (8, 12), per, 4), x)  # type: ignore[arg-type]
    if per == "block":
        assert torch.equal(y[1], x[:4, 4:8].reshape(-1))
    with pytest.raises(ValueError, match="do not divide"):
        ranges.split(x, "group", 5)


def test_finer_granularity_never_raises_the_error() -> None:
    x = torch.randn(16, 64) * torch.logspace(-2, 1, 16)[:, None]

    def error(per: str) -> float:
        y = ranges.split(x, per, 16)  # type: ignore[arg-type]
        scale, zero = ranges.grid(*ranges.absmax(y), 4, True)
        return float((ranges.fake(y, scale, zero, 4, True) - y).square().sum())

    assert error("group") <= error("row") <= error("tensor")


def test_mse_range_beats_min_max_and_percentile_is_an_element() -> None:
    x = torch.cat([torch.randn(2, 300), torch.full((2, 1), 9.0)], 1)
    for symmetric in (True, False):

        def error(bounds: tuple[torch.Tensor, torch.Tensor], symmetric: bool = symmetric) -> float:
            return float((ranges.fake(x, *ranges.grid(*bounds, 3, symmetric), 3, symmetric) - x).abs().pow(2.4).sum())

        assert error(ranges.mse(x, 3, symmetric)) < error(ranges.minmax(x))
    magnitudes = sorted(x[0].abs().tolist())
    assert ranges.percentile(x, 99)[1][0, 0] == pytest.approx(magnitudes[round(0.99 * 301) - 1])


def test_entropy_threshold_against_a_loop() -> None:
    x = np.abs(np.random.default_rng(0).normal(size=4000))
    x[0] = 12.0
    bins, levels = 256, 16
    counts, _ = np.histogram(x, bins, (0.0, 12.0))
    best, chosen = math.inf, 0
    for i in range(levels, bins + 1):
        P = [float(c) for c in counts[:i]]
        Q = [0.0] * i
        edges = [int(i * k / levels) for k in range(levels + 1)]
        for a, b in itertools.pairwise(edges):
            filled = [j for j in range(a, b) if counts[j] > 0]
            for j in filled:
                Q[j] = sum(P[a:b]) / len(filled)
        P[-1] += float(counts[i:].sum())
        q = [v + 1e-4 for v in Q]
        kl = sum(p / sum(P) * math.log((p / sum(P)) / (v / sum(q))) for p, v in zip(P, q, strict=True) if p > 0)
        if kl < best:
            best, chosen = kl, i
    threshold = float(ranges.entropy(torch.tensor(x)[None], 5, bins)[1])
    assert threshold == pytest.approx((chosen + 0.5) * 12 / bins)
    assert threshold < 8  # the lone outlier is given up


def test_moving_average_by_hand() -> None:
    moving = ranges.Moving(momentum=0.9).update(torch.tensor([[-1.0, 2.0]])).update(torch.tensor([[-3.0, 1.0]]))
    assert moving.low is not None and moving.high is not None
    assert float(moving.low) == pytest.approx(-1.2) and float(moving.high) == pytest.approx(1.9)


def test_dynamic_beats_static_on_shifted_data() -> None:
    config = ActivationGrid(per="tensor", dynamic=False)
    static = calibrated(torch.randn(50, 8), config)
    x = torch.randn(20, 8) * 20
    still = (fake_activation(x, config, static) - x).square().sum()
    live = (fake_activation(x, ActivationGrid(per="token")) - x).square().sum()
    assert live < still
    with pytest.raises(ValueError, match="static"):
        fake_activation(x, config)
    with pytest.raises(ValueError, match="dynamic"):
        ActivationGrid(per="token", dynamic=False)


@given(st.floats(1e-9, 1e6), st.integers(-(2**30), 2**30))
@settings(max_examples=100, deadline=None)
def test_dyadic_requantization_rounds_to_nearest(multiplier: float, acc: int) -> None:
    m, n = dyadic(torch.tensor([multiplier], dtype=torch.float64))
    assert abs(int(m) * 2.0 ** -int(n) / multiplier - 1) < 2**-30
    got = int(requantize(torch.tensor([acc]), m, n, 0, -(2**40), 2**40))
    want = max(-(2**40), min(2**40, acc * multiplier))
    assert abs(got - want) <= 0.5 + abs(want) * 2**-30 + 1e-9


def test_integer_linear_equals_the_simulation_to_one_step() -> None:
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(30, 24, generator=g), torch.randn(10, 24, generator=g), torch.randn(10, generator=g)
    s_x, z_x = (float(t) for t in ranges.grid(*ranges.minmax(x.reshape(1, -1)), 8))
    s_w, z = ranges.grid(*ranges.absmax(W), 8, True)
    q_x = ranges.encode(x, torch.tensor(s_x), torch.tensor(z_x), 8)
    q_w = ranges.encode(W, s_w, z, 8, True)
    y = (q_x - z_x) * s_x @ (q_w * s_w).T + b
    s_y = float(y.abs().max()) / 127
    got = integer_linear(q_x.long(), int(z_x), q_w.long(), torch.round(b / (s_x * s_w[:, 0])), s_x * s_w[:, 0] / s_y, 0)
    assert not got.is_floating_point()
    assert int((got - torch.round(y / s_y)).abs().max()) <= 1
