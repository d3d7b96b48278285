"""The GPTQ format against a naive reader, word by word, and back; one format into another."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from solving import solve

import lissom
from lissom.core import FormatError, Grid
from lissom.export import GPTQ, LayerPlan, open_model
from lissom.export.layout import Layout
from lissom.pipeline import convert


def by_hand(tensors: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    """The layout as AutoGPTQ's documentation gives it: shift each word, add one to zero points in version 1."""
    qweight, qzeros = (tensors[n].numpy().astype(np.uint32) for n in ("qweight", "qzeros"))
    scales, g_idx = tensors["scales"].numpy().astype(np.float32), tensors["g_idx"].numpy()
    columns, rows = len(g_idx), scales.shape[1]

    def code(words: np.ndarray, i: int) -> int:  # i-th code of a column of words
        at = i * bits
        low = int(words[at // 32]) >> (at % 32)
        if at % 32 + bits > 32:  # three bits: one code lies in two words
            low |= int(words[at // 32 + 1]) << (32 - at % 32)
        return low & (2**bits - 1)

    weight = np.zeros((rows, columns), np.float32)
    for o in range(rows):
        for i in range(columns):
            g = g_idx[i]
            zero = code(qzeros[g], o) + (1 if version == 1 else 0)
            weight[o, i] = np.float32(code(qweight[:, o], i) - zero) * scales[g, o]
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, None])
@pytest.mark.parametrize(("version", "symmetric"), [(1, True), (2, True), (2, False)])
def test_words_are_read_by_hand(bits, group, version, symmetric):
    g = torch.Generator().manual_seed(bits)
    W = torch.randn(32, 64, generator=g)
    if not symmetric:
        W[:4] = W[:4].abs()  # zero points of 0
    one = solve(W, None, Grid(bits, group, symmetric))
    codec = GPTQ(version)
    tensors, entry = codec.encode(one, Layout()), codec.entry(one, Layout())
    assert one.codes is not None and (symmetric or float(one.codes.zero.min()) == 0)
    assert np.array_equal(by_hand(tensors, bits, version), one.weight.numpy())
    back = codec.decode(tensors, entry)
    assert torch.equal(back.codes.values, one.codes.values) and torch.equal(back.weight, one.weight)


def test_activation_order_of_other_tools_is_read():
    one = solve(torch.randn(32, 64), None, Grid(4, 16, True))
    codec = GPTQ()
    tensors, entry = codec.encode(one, Layout()), codec.entry(one, Layout())
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(64, generator=torch.Generator().manual_seed(1))].contiguous()
    back = codec.decode(tensors, entry)
    assert back.codes is None and np.array_equal(by_hand(tensors, 4, 1), back.weight.numpy())
    with pytest.raises(FormatError, match="g_idx must be"):
        codec.decode(tensors | {"g_idx": tensors["g_idx"] + 9}, entry)


def test_an_artefact_is_written_read_and_described(random_checkpoint, tmp_path):
    recipe = {
        "steps": [{"use": "rtn", "bits": 4, "group_size": 16, "symmetric": True, "ignore": ["down"]},
                  {"use": "rtn", "bits": 8, "group_size": 16, "symmetric": True, "only": ["down"]}],
        "save": {"format": "gptq"},
    }  # fmt: skip
    made = lissom.compress(random_checkpoint("llama"), tmp_path / "out", recipe, overrides=["samples=1", "length=8"])
    assert "not tried" in made["verified"]["transformers"] or "same logits" in made["verified"]["transformers"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 16, True, False)
    assert config["dynamic"] == {
        f"+:^model\\.layers\\.{i}\\.mlp\\.down_proj$": {"bits": 8, "group_size": 16, "sym": True} for i in range(2)
    }
    opened = open_model(tmp_path / "out")
    assert opened.format == "gptq" and opened.layer("model.layers.1.mlp.down_proj").codes.bits == 8
    tensors = load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    mine = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
    assert np.array_equal(by_hand(mine, 4, 1), opened.layer(name).weight.numpy())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 5}, "holds 2, 3, 4 or 8 bits, not 5"),
        ({"symmetric": False}, "no zero point 0; set symmetric"),
        ({"group_size": 24}, "groups that divide the 64 inputs"),
        ({"shape": (30, 64)}, "do not fill whole 32-bit words"),
        ({"bits": None}, "expect every linear layer quantized"),
        ({"transposed": True}, "not GPT-2's Conv1D"),
        ({"form": "nf4"}, "holds uniform grids, not nf4"),
        ({"kind": "embedding"}, "keeps embeddings dense"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(change, reason):
    plan = {"name": "layer", "shape": (32, 64), "bits": 4, "group_size": 16, "symmetric": True} | change
    assert reason in " ".join(GPTQ().check(LayerPlan(**plan)))


def test_damaged_files_are_named():
    codec, one = GPTQ(), solve(torch.randn(32, 64), None, Grid(4, 16, True))
    tensors, entry = codec.encode(one, Layout()), codec.entry(one, Layout())
    with pytest.raises(FormatError, match="qweight has shape"):
        codec.decode(tensors | {"qweight": tensors["qweight"][:-1]}, entry)
    with pytest.raises(FormatError, match="not all finite"):
        codec.decode(tensors | {"scales": tensors["scales"] * torch.inf}, entry)
    with pytest.raises(FormatError, match="must have the tensors"):
        codec.decode({k: v for k, v in tensors.items() if k != "g_idx"}, entry)


@pytest.fixture(scope="module")
def packed(random_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    recipe = {"steps": [{"use": "rtn", "bits": 4, "group_size": 16, "symmetric": True}], "save": {"format": "packed"}}
    lissom.compress(
        random_checkpoint("llama"), folder, recipe, overrides=["samples=1", "length=8", "save.dtype=float16"]
    )
    return folder


@pytest.mark.parametrize("format", ["gptq", "gptq-v2", "compressed-tensors", "packed"])
def test_codes_go_from_one_format_to_another(format, packed, tmp_path):
    made = convert(packed, tmp_path / "there", format)
    assert made["exact"] and made["quantized"] == 14 and not made["notes"]
    back = convert(tmp_path / "there", tmp_path / "back", "packed")
    assert back["exact"]
    before, after = open_model(packed), open_model(tmp_path / "back")
    for name in (n.removesuffix(".weight") for n in before.names() if "proj" in n):
        a, b = before.layer(name).codes, after.layer(name).codes
        assert (
            torch.equal(a.values, b.values)
            and torch.equal(a.scale, b.scale)
            and (a.bits, a.group_size) == (b.bits, b.group_size)
        )
    assert before.shape("model.norm.weight") == after.shape("model.norm.weight")


def test_a_conversion_that_cannot_be_is_refused_before_it_starts(random_checkpoint, packed, tmp_path):
    with pytest.raises(FormatError, match="expect every linear layer quantized"):
        convert(random_checkpoint("llama"), tmp_path / "out", "gptq")
    recipe = {"steps": [{"use": "vs-quant", "bits": 4, "group_size": 16}], "save": {"format": "packed"}}
    lissom.compress(random_checkpoint("llama"), tmp_path / "vs", recipe, overrides=["samples=1", "length=8"])
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(FormatError, match="twolevel"):
            convert(tmp_path / "vs", tmp_path / "out", format)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_zeros_stay_zeros_in_a_packed_copy(random_checkpoint, tmp_path):
    recipe = {"steps": [{"use": "magnitude", "sparsity": 0.6}], "save": {"format": "dense", "dtype": "float16"}}
    lissom.compress(random_checkpoint("llama"), tmp_path / "dense", recipe)
    made = convert(tmp_path / "dense", tmp_path / "packed", "packed")
    dense, small = open_model(tmp_path / "dense"), open_model(tmp_path / "packed")
    assert made["exact"] and small.bytes < 0.85 * dense.bytes  # a third of it is the embedding
