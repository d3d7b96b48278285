"""Sparse plus low rank in the packed form: the weights come back bit for bit, and the bytes are those of the parts."""

import pytest
import torch

import lissom
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
    with pytest.raises(FormatError, match="must have the tensor A"):
        codec.decode({k: v for k, v in tensors.items() if k != "A"}, entry)
    with pytest.raises(FormatError, match="do not fit together"):
        codec.decode(tensors | {"B": tensors["B"][:-1]}, entry)


def test_a_run_with_oats_is_loaded_back_and_takes_fewer_bytes_than_its_dense_form(random_checkpoint, tmp_path):
    steps = [{"use": "oats", "sparsity": 0.5, "alternations": 3}]
    small = ["calibration.samples=2", "calibration.length=24"]
    sizes = {}
    for form in ("packed", "dense"):
        recipe = {"steps": steps, "save": {"format": form, "dtype": "float16"}}
        made = lissom.compress(random_checkpoint("llama"), tmp_path / form, recipe, overrides=small)
        assert "decode bit for bit" in made["verified"]["layers"]
        sizes[form] = sum(layer["bytes"] for layer in made["layers"])
    assert sizes["packed"] < 0.85 * sizes["dense"]
