"""Every form of lissom.core.stored in the packed form: what a solver made comes back bit for bit, in the bytes it counts."""

from __future__ import annotations

from typing import get_type_hints

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lissom
from lissom.core import NM, Both, FormatError, Grid, Problem, Rotation, Solved, Sparse, Stats, grid_of, stored_bits
from lissom.export import open_model
from lissom.export.forms import FORMS
from lissom.export.layout import Layout
from lissom.export.packed import Packed
from lissom.methods import METHODS

CASES = {
    "nf4": ("codebook", {"table": "nf"}, 4),
    "fp4": ("codebook", {"table": "fp4"}, 4),
    "mxfp4": ("codebook", {"table": "mxfp4"}, 4),
    "nvfp4": ("codebook", {"table": "nvfp4"}, 4),
    "fp8": ("codebook", {"table": "e4m3"}, 8),
    "power-of-two": ("codebook", {"table": "power-of-two"}, 4),
    "kmeans": ("codebook", {"table": "kmeans"}, 3),
    "bcq": ("bcq", {"rounds": 2}, 3),
    "gobo": ("gobo", {}, 3),
    "spqr": ("spqr", {}, 3),
    "quip": ("quip", {"passes": 1}, 2),
    "vs-quant": ("vs-quant", {}, 4),
    "hqq": ("hqq", {}, 3),
    "loftq": ("loftq", {"rank": 4}, 3),
    "loftq-nf": ("loftq", {"rank": 4, "base": "nf"}, 4),
    "llm-int8": ("llm-int8", {"threshold": 3.0}, 8),
    "awq": ("awq", {}, 4),
}


def solved(case: str, pattern: Sparse | NM | None = None) -> Solved:
    name, settings, bits = CASES[case]
    g = torch.Generator().manual_seed(0)
    W = torch.randn(48, 96, generator=g)
    W[3, 5], W[7, 90] = 9.0, -8.0
    grid = Grid(bits, 16)
    constraint = Both(pattern, grid) if pattern else grid
    problem = Problem.of(W, Stats.of(torch.randn(200, 96, generator=g)), constraint)
    method = METHODS[name]
    return problem.split(method.run(problem, method.config(**settings)))["layer"]


def through_a_file(one: Solved, pattern: str, tmp_path) -> tuple[Tensor, int, dict]:
    """Weights as decoded from a file, bytes of the tensors, the entry."""
    from lissom.export.files import write_file

    codec, layout = Packed(), Layout(torch.float16, pattern)
    tensors, entry = codec.encode(one, layout), codec.entry(one, layout)
    write_file(tmp_path / "layer.safetensors", tensors, {})
    again = load_file(tmp_path / "layer.safetensors")
    back = codec.decode(again, entry)
    assert back.form is not None or back.codes is not None
    return back.weight, sum(t.numel() * t.element_size() for t in tensors.values()), entry


@pytest.mark.parametrize("case", CASES)
def test_a_dense_form_comes_back_bit_for_bit_in_the_bytes_that_it_counts(case, tmp_path):
    one = solved(case)
    weight, size, _ = through_a_file(one, "dense", tmp_path)
    assert torch.equal(weight, one.weight)
    form = one.codes if one.codes is not None else one.stored
    tables = (
        4096 if case in ("nf4", "fp4", "nvfp4", "mxfp4", "fp8", "power-of-two", "loftq-nf") else 0
    )  # kept in the file
    assert 8 * size <= 1.02 * stored_bits(form) + 256 + 2 * tables
    bits, _ = grid_of(form) or (16, None)
    assert bits == CASES[case][2] or case in ("fp8", "power-of-two")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("pattern", "name"), [(Sparse(0.6), "unstructured"), (NM(1, 4), "1:4")])
def test_a_form_with_zeros_comes_back_and_stores_what_remains(case, pattern, name, tmp_path):
    one = solved(case, pattern)
    assert float((one.weight == 0).float().mean()) > 0.55
    weight, size, _ = through_a_file(one, name, tmp_path)
    assert torch.equal(weight, one.weight)
    if case != "quip":  # rotated codes are all needed
        whole = through_a_file(solved(case), "dense", tmp_path)[1]
        saved = 0.55 * CASES[case][2] - 1.05  # bits of the codes that are left out, and of the mask
        assert 8 * size <= 8 * whole - saved * weight.numel() + 0.15 * weight.numel()


def test_every_tensor_of_every_form_says_how_it_is_stored():
    for cls in FORMS.values():
        for name, hint in get_type_hints(cls, include_extras=True).items():
            assert hint is not Tensor, f"{cls.__name__}.{name} is a bare tensor: give it a type of lissom.core.parts"


def test_a_file_is_read_by_hand(tmp_path):
    """SpQR without lissom's reader: streams of bits, counts of outliers in each row, second-level scales."""
    one = solved("spqr")
    _, _, entry = through_a_file(one, "dense", tmp_path)
    with safe_open(tmp_path / "layer.safetensors", "np") as file:
        raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def stream(name: str, entry: dict) -> np.ndarray:
        if "constant" in entry:
            return np.full(entry["shape"], entry["constant"])
        bits = np.unpackbits(raw[name], bitorder="little")[: entry["bits"] * int(np.prod(entry["shape"]))]
        return (bits.reshape(-1, entry["bits"]) * 2 ** np.arange(entry["bits"])).sum(1).reshape(entry["shape"])

    form = entry["form"]
    base = form["base"]
    assert (form["form"], base["form"]) == ("patched", "twolevel")
    codes = stream("base.values", base["values"])
    second = {}
    for name in ("scale", "zero"):
        d = base[name]
        step, low = (
            np.float32(raw[f"base.{name}.{k}"]) if "as" in d[k] else np.full(d[k]["shape"], d[k]["constant"])
            for k in ("step", "base")
        )
        wide = [np.repeat(t.astype(np.float32), d["group"], 1)[:, : 96 // 16] for t in (step, low)]
        second[name] = np.repeat(stream(f"base.{name}.codes", d["codes"]).astype(np.float32) * wide[0] + wide[1], 16, 1)
    weight = (codes.astype(np.float32) - second["zero"]) * second["scale"]
    rows = np.repeat(np.arange(48), stream("row", form["row"]))
    weight[rows, stream("column", form["column"])] = np.float32(raw["value"])
    assert np.array_equal(weight, one.weight.numpy()) and len(rows) > 3


def test_a_rotation_is_stored_as_its_seed(tmp_path):
    one = solved("quip")
    _, _, entry = through_a_file(one, "dense", tmp_path)
    rotated = entry["form"]["base"]
    assert rotated["form"] == "rotated" and set(rotated["left"]) == {"size", "seed", "kind"}
    assert rotated["right"]["size"] == 96 and Rotation(**rotated["right"]).matrix().shape == (96, 96)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, e: t.pop("base.values"), "must have the tensor base.values"),
        (lambda t, e: t.update(more=torch.zeros(1)), "its form does not: more"),
        (lambda t, e: t.update({"base.values": t["base.values"][:-1]}), "holds"),
        (lambda t, e: e["form"].update(form="strange"), "unknown form 'strange'"),
        (lambda t, e: e["form"]["base"].pop("bits"), "damaged"),
        (lambda t, e: e["form"]["base"]["values"].update(shape=[48, 95]), "does not fit"),
        (lambda t, e: t.update(value=t["value"] * torch.inf), "not finite"),
        (lambda t, e: t.update(value=t["value"][:-1]), "do not fit together"),
        (lambda t, e: t.update(value=t["value"].float()), "must be torch.float16"),
    ],
)
def test_damage_is_named(damage, message):
    one, codec, layout = solved("spqr"), Packed(), Layout(torch.float16)
    tensors, entry = codec.encode(one, layout), codec.entry(one, layout)
    damage(tensors, entry)
    with pytest.raises(FormatError, match=message):
        codec.decode(tensors, entry)


@pytest.mark.parametrize(
    "step", [{"use": "quip", "bits": 3, "passes": 1}, {"use": "spqr", "bits": 3, "group_size": 16}]
)
def test_a_run_keeps_the_form_and_its_bytes(step, random_checkpoint, tmp_path):
    recipe = {"steps": [step], "save": {"format": "packed", "dtype": "float16"}}
    small = ["calibration.samples=2", "calibration.length=24"]
    made = lissom.compress(random_checkpoint("llama"), tmp_path / "out", recipe, overrides=small)
    assert "decode bit for bit" in made["verified"]["layers"]
    opened = open_model(tmp_path / "out")
    layer = made["layers"][0]
    assert opened.layer(layer["name"]).form is not None and layer["bits"] == 3
    assert sum(r["bytes"] for r in made["layers"]) < 0.5 * 2 * sum(r["weights"] for r in made["layers"])
