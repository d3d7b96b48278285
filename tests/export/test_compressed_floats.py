"""FP8, NVFP4 and MXFP4 of compressed-tensors: against the library's own decompression, and through transformers."""

from __future__ import annotations

import json

import pytest
import torch

import lissom
from lissom.core import FormatError, Grid, Problem, RecipeError, Stats
from lissom.export import CompressedTensors, Layout, open_model
from lissom.methods import METHODS
from lissom.pipeline import convert
from tiny import tiny_model

TABLES = {"e4m3": (8, 0), "e4m3-groups": (8, 32), "nvfp4": (4, 16), "mxfp4": (4, 32)}


def solved(case):
    bits, group = TABLES[case]
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 24)[:, None]
    W[3, :32] = 0
    problem = Problem.of(W, Stats.of(torch.ones(1, 64)), Grid(bits, group or None))
    method = METHODS["codebook"]
    return problem.split(method.run(problem, method.config(table=case.split("-")[0])))["layer"]


@pytest.mark.parametrize("case", TABLES)
def test_the_library_decodes_the_same_weights(case):
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    codec, one = CompressedTensors(), solved(case)
    tensors, entry = codec.encode(one, Layout()), codec.entry(one, Layout())
    config = QuantizationConfig.model_validate(codec.config({"layer": entry}, Layout()))
    (scheme,) = config.config_groups.values()
    given = {k: v.float() if k == "weight_scale" and v.dtype == torch.float16 else v for k, v in tensors.items()}
    theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(given, scheme)["weight"].float()
    back = codec.decode(tensors, entry)
    if "fp4" in case:  # the library unpacks FP4 in bfloat16
        assert torch.equal(theirs, back.weight.bfloat16().float()) or float((theirs - back.weight).abs().max()) <= (
            2**-7 * float(back.weight.abs().max())
        )
    else:
        assert torch.equal(theirs, back.weight)
    gap = (back.weight - one.weight).abs().max() / one.weight.abs().max()
    assert float(gap) == 0 if case != "nvfp4" else float(gap) < 1e-6  # scales are divided by 1 / tensor scale
    assert back.form.bits == one.stored.bits and torch.equal(back.form.values, one.stored.values)


def test_four_bit_floats_by_hand():
    """Sign and magnitude, the earlier input in the lower half."""
    codec, one = CompressedTensors(), solved("mxfp4")
    tensors = codec.encode(one, Layout())
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    byte = int(tensors["weight_packed"][5, 9])
    exponent = int(tensors["weight_scale"][5, 0]) - 127
    values = [(-1 if n & 8 else 1) * magnitudes[n & 7] * 2.0**exponent for n in (byte & 15, byte >> 4)]
    assert values == one.weight[5, 18:20].tolist()


STEPS = {
    "e4m3": [{"use": "codebook", "table": "e4m3", "bits": 8, "group_size": 0}],
    "nvfp4": [{"use": "codebook", "table": "nvfp4", "bits": 4}],
    "mxfp4": [{"use": "codebook", "table": "mxfp4", "bits": 4}],
    "mixed": [
        {"use": "codebook", "table": "e4m3", "bits": 8, "group_size": 0, "only": ["down"]},
        {"use": "codebook", "table": "nvfp4", "bits": 4, "only": ["gate", "up"]},
        {"use": "rtn", "bits": 4, "group_size": 16, "symmetric": True, "only": ["q", "k", "v"]},
    ],
}


@pytest.mark.parametrize("name", STEPS)
def test_transformers_loads_a_run_to_the_same_logits(name, tmp_path):
    tiny_model("llama", tmp_path / "dense", intermediate_size=64)
    recipe = {"steps": STEPS[name], "save": {"format": "compressed-tensors", "dtype": "float16"}}
    made = lissom.compress(
        tmp_path / "dense", tmp_path / "out", recipe, overrides=["calibration.samples=1", "calibration.length=16"]
    )
    said = made["verified"]["transformers"]
    assert "gives the same logits" in said and ("bfloat16" in said) == (name != "e4m3")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == (3 if name == "mixed" else 1)
    assert config["format"] == {
        "e4m3": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mixed": "mixed-precision",
    }[name]  # fmt: skip
    opened = open_model(tmp_path / "out")
    forms = {n: opened.layer(f"model.layers.0.{n}_proj") for n in ("mlp.down", "mlp.up", "self_attn.q", "self_attn.o")}
    if name == "mixed":
        assert forms["mlp.down"].form.name == "e4m3" and forms["mlp.up"].form.name == "nvfp4"
        assert forms["self_attn.q"].codes.bits == 4 and forms["self_attn.o"].form is None
    packed = convert(tmp_path / "out", tmp_path / "packed", "packed")
    assert packed["exact"]


def test_what_has_no_form_is_refused_in_the_plan(tmp_path):
    tiny_model("llama", tmp_path / "dense")  # 48 inputs of down: no whole blocks of 32
    for step, reason in (
        ({"use": "codebook", "table": "nf", "bits": 4, "group_size": 16}, "has no form nf"),
        ({"use": "codebook", "table": "mxfp4", "bits": 4}, "groups that divide the 48 inputs, 32 does not"),
        ({"use": "quip", "bits": 2}, "has no form quip"),
    ):
        with pytest.raises(RecipeError, match=reason):
            lissom.plan(tmp_path / "dense", {"steps": [step], "save": {"format": "compressed-tensors"}})
    with pytest.raises(RecipeError, match="holds uniform grids, not nvfp4"):
        lissom.plan(
            tmp_path / "dense",
            {"steps": [{"use": "codebook", "table": "nvfp4", "bits": 4}], "save": {"format": "gptq"}},
        )


def test_damage_is_named():
    codec, one = CompressedTensors(), solved("nvfp4")
    tensors, entry = codec.encode(one, Layout()), codec.entry(one, Layout())
    with pytest.raises(FormatError, match="do not fit 24 × 64"):
        codec.decode(tensors | {"weight_packed": tensors["weight_packed"][:, :-1]}, entry)
    with pytest.raises(FormatError, match="not all finite"):
        codec.decode(tensors | {"weight_global_scale": torch.zeros(1)}, entry)
