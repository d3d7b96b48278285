"""Sparse plus low rank in the packed form: the weights come back bit for bit, and the bytes are those of the parts."""

import pytest
import torch

from lissom.core import NM, FormatError, Problem, Sparse, Stats, stored_bits
from lissom.export.layout import Layout
from lissom.export.packed import Packed
from lissom.methods.prune.oats import OATS, oats


def solved(pattern):
    g = torch.Generator().manual_seed(0)
    problem = Problem.of(torch.randn(48, 64, generator=g), Stats.of(torch.randn(200, 64, generator=g)), pattern)
    return problem.split(oats(problem, OATS(alternations=3)))["layer"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "name"), [(Sparse(0.6), "unstructured"), (NM(2, 4), "2:4")])
def test_weights_come_back_bit_for_bit(pattern, name, dtype):
    one, codec, layout = solved(pattern), Packed(), Layout(dtype, name)
    tensors, entry = codec.encode(one, layout), codec.entry(one, layout)
    assert torch.equal(codec.decode(tensors, entry).weight, one.weight)
    size = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= stored_bits(one.stored) + 128 < 16 * one.weight.numel()


def test_damaged_factors_are_named():
    one, codec, layout = solved(Sparse(0.6)), Packed(), Layout(torch.float16, "unstructured")
    tensors, entry = codec.encode(one, layout), codec.entry(one, layout)
    with pytest.raises(FormatError, match="left must be float16"):
        codec.decode({k: v for k, v in tensors.items() if k != "left"}, entry)
    with pytest.raises(FormatError, match="right must be float16"):
        codec.decode(tensors | {"right": tensors["right"][:-1]}, entry)
