"""What the run does beside the weights: rounded inputs and caches, against loops and against compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import NumericalError
from lissom.methods.quantize import METHODS
from lissom.methods.quantize.activations import Activations, round_input, static_scale
from lissom.methods.quantize.kv_cache import CacheGrid, KVCache, fake_cache, fake_integer, in_full_precision
from lissom.methods.quantize.rotations import QuaRot, turns


def library(x, symmetric, strategy, bits, group=None):
    """compressed-tensors' own simulated rounding."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, dynamic=True, group_size=group)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    return fake_quantize(x, scale, zero, args)


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), outlier=st.sampled_from([1.0, 1e4]), seed=st.integers(0, 99))
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(bits, outlier, seed):
    x = sample(2, 5, 16, seed=seed)
    x[0, 0, 3] *= outlier
    x[1, 2] = 0  # a token of zeros
    x[1, 3] = 2.5  # a constant one
    got = round_input(x, bits)
    assert torch.equal(got, library(x, True, "token", bits)) and got.isfinite().all()
    assert not got[1, 2].any()
    step = x.abs().amax(-1, keepdim=True) / (2**bits - 1) * 2
    assert bool(((got - x).abs() <= step / 2 * 1.001).all())  # half a step, the largest one included


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99), outlier=st.sampled_from([1.0, 1e4]))
def test_integer_caches_are_those_of_compressed_tensors(bits, seed, outlier):
    x = sample(2, 3, 7, 16, seed=seed)
    x[0, 0, 0, 0] *= outlier
    x[0, 1, 2] = 0
    grid = CacheGrid(bits, "token", 8, zero="integer")
    assert torch.equal(fake_cache(x, grid), library(x, False, "group", bits, 8))
    assert fake_integer(torch.zeros(2, 4), bits).eq(0).all()


@pytest.mark.parametrize("calibrate", ["minmax", "absmax", "ema", "percentile", "mse", "entropy"])
def test_static_scales(calibrate):
    x = sample(4000)
    x[7] = 60.0
    tops = x.view(4, 1000).abs().amax(1)
    scale = static_scale(x, tops, Activations(per="tensor", calibrate=calibrate, percent=99.9, momentum=0.5))
    full = 60 / 127.5
    assert scale == torch.tensor(scale).half().item()
    assert scale == pytest.approx(full, rel=1e-3) if calibrate in ("minmax", "absmax") else 0 < scale <= full * 1.01
    if calibrate == "percentile":
        top = x.abs().kthvalue(round(0.999 * 4001)).values
        assert scale == pytest.approx(float(top) / 127.5, rel=1e-3)
    if calibrate == "ema":  # the first sample holds the outlier, and halves with each of the three after it
        top = 60 / 8 + float(tops[1]) / 8 + float(tops[2]) / 4 + float(tops[3]) / 2
        assert scale == pytest.approx(top / 127.5, rel=1e-3)
    error = (round_input(x, 8, scale) - x).abs()
    assert float(error[x.abs() < 127 * scale].max()) <= scale / 2 * 1.001
    assert static_scale(torch.zeros(8), torch.zeros(2), Activations(per="tensor")) == 1.0
    with pytest.raises(NumericalError, match="per: token"):
        static_scale(torch.zeros(1), torch.tensor([float("inf")]), Activations(per="tensor"))


@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_query_reads_what_a_growing_cache_would_hold(per, recent):
    """Against a cache that is filled token by token and rounds a group of channels when it is full and old enough."""
    x, group = sample(1, 2, 21, 8), 4
    grid = CacheGrid(3, per, group, recent)
    stored, fresh = fake_cache(x, CacheGrid(3, per, group)), in_full_precision(21, grid)
    for t in range(21):
        for j in range(t + 1):
            if per == "token":
                full, piece = t - j < recent, x[:, :, j : j + 1]
            else:
                last = j // group * group + group - 1
                full, piece = last > t or t - last < max(recent, 1), x[:, :, last - group + 1 : last + 1]
            assert full == (fresh is not None and bool(fresh[t, j]))
            if not full:  # nothing beyond the query's own token decides what it reads
                alone = fake_cache(piece, CacheGrid(3, per, group))[:, :, j % piece.shape[2] if per == "channel" else 0]
                assert torch.equal(alone, stored[:, :, j])


def test_what_is_not_finite_is_named():
    bad = sample(2, 8)
    bad[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        round_input(bad, 8)
    with pytest.raises(NumericalError, match="zero: integer"):
        fake_cache(sample(1, 1, 4, 8) * 1e6, CacheGrid(4, "token", 8))


def test_settings_are_checked():
    for bad in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"recent": -1}, {"key_bits": 12}, {"percent": 0.0}):
        with pytest.raises(ValueError):
            KVCache(**bad)
    for bad in ({"bits": 1}, {"percent": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError):
            Activations(**bad)
    assert KVCache(key_bits=8).grids()[0].bits == 8 and KVCache(key_bits=8).grids()[1].bits == 4
    assert {METHODS[n].kind for n in ("activations", "kv-cache")} == {"operator"} and METHODS[
        "quarot"
    ].kind == "rotation"


def test_quarot_turns_what_it_is_asked_to():
    made = turns(QuaRot(online=True), 32, 8, 48)
    assert [r.size for r in (made.stream, made.values, made.inner)] == [32, 8, 48]
    assert turns(QuaRot(stream=False, values=False), 32, 8, 48) == turns(
        QuaRot(stream=False, values=False, seed=3), 32, 8, 48
    )
    x = sample(3, 32)
    torch.testing.assert_close(made.stream.undo(made.stream.apply(x)), x)
