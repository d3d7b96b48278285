"""The permuted dense model computes the same function in every architecture, and pruning starts from it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lissom
import tiny
from lissom.core import RecipeError
from lissom.export import open_model
from lissom.models import Model
from lissom.models.permute import free_channels, permuted
from lissom.pipeline.permutation import pattern_of
from lissom.pipeline.recipe import read
from tiny import KINDS, tiny_model

SMALL = ["calibration.samples=4", "calibration.length=24"]


def _logits(model, blocks, ids):
    h = model.embed(ids)
    for block in blocks:
        h = block.forward(h)
    return model.head(h)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_orders_of_the_free_channels_leave_the_logits(kind, tmp_path):
    tiny_model(kind, tmp_path)
    model = Model(open_model(tmp_path))
    ids = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    dense, turned = [], []
    for i in range(model.blocks):
        dense.append(model.load_block(i))
        block = model.load_block(i)
        for units, segments in free_channels(block.row, block.config, block.linears):
            size = units.count // segments
            order = torch.cat([torch.randperm(size, generator=g) + s * size for s in range(segments)])
            before = block.parameters
            block.parameters = permuted(before, units, order)
            changed = {n for n, v in block.parameters.items() if not torch.equal(v, before[n])}
            assert {f"{n}.weight" for n in (*units.rows, *units.columns)} <= changed
        turned.append(block)
    expected = _logits(model, dense, ids)
    torch.testing.assert_close(
        _logits(model, turned, ids), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


def test_the_step_alone_writes_an_ordinary_equal_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model("llama", tmp_path / "dense")
    lissom.compress(
        tmp_path / "dense",
        tmp_path / "out",
        [{"use": "channel-permutation", "pattern": "2:4"}],
        overrides=[*SMALL, "dtype=float32"],
    )
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("dense", "out"))
    ids = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=1e-4, atol=1e-5)
    pairs = zip(old.named_parameters(), new.parameters(), strict=True)
    moved = {name.split(".")[-2] for (name, a), b in pairs if not torch.equal(a, b)}
    assert moved == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_pruning_starts_from_the_permuted_model(tmp_path):
    tiny_model("llama", tmp_path / "dense")
    steps = [{"use": "channel-permutation"}, {"use": "ria", "pattern": "2:4"}]
    lissom.compress(tmp_path / "dense", tmp_path / "out", steps, overrides=SMALL)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    shares = [s for kinds in manifest["structured"][0]["retained"].values() for s in kinds.values()]
    assert all(after >= before for before, after in shares)
    assert any(after > before for before, after in shares)
    assert manifest["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:7"])
def test_patterns_that_do_not_fit_are_refused_in_the_plan(pattern, tmp_path):
    tiny_model("llama", tmp_path)
    with pytest.raises(RecipeError, match="channel-permutation"):
        lissom.plan(tmp_path, [{"use": "channel-permutation", "pattern": pattern}, {"use": "ria", "pattern": "2:4"}])


def test_the_pattern_is_that_of_the_pruning_step(tmp_path):
    tiny_model("llama", tmp_path)
    model, permute = Model(open_model(tmp_path)), {"use": "channel-permutation"}
    for steps, nm in [
        ([permute, {"use": "ria", "pattern": "2:4"}], (2, 4)),
        ([permute, {"use": "uniform"}, {"use": "ria", "pattern": "n:8", "sparsity": 0.6}], (3, 8)),
        ([{**permute, "pattern": "1:4"}, {"use": "ria", "pattern": "2:4"}], (1, 4)),
    ]:
        recipe = read(steps)
        assert pattern_of(model, recipe.steps[0], recipe) == nm
    with pytest.raises(RecipeError, match="auto before a step that prunes N:M"):
        lissom.plan(tmp_path, [permute, {"use": "ria", "sparsity": 0.5}])


def test_n_of_16_per_layer_on_permuted_channels_is_packed_with_indices(trained, tmp_path):
    """What is in the files: an index for each layer, N from its budget, no more than N in any 16, four of 16 on average."""
    out = tmp_path / "out"
    steps = [
        {"use": "channel-permutation"},
        {"use": "loss-clusters"},
        {"use": "alps", "sparsity": 0.75, "pattern": "n:16"},
        {"use": "gptq", "bits": 4, "group_size": 32},
    ]
    lissom.compress(trained, out, steps, overrides=[*SMALL, "format=packed", f"calibration.data={tiny.__file__}"])
    manifest = json.loads((out / "manifest.json").read_text())
    config = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    opened, kept = open_model(out), {}
    for layer in manifest["layers"]:
        name, weights = layer["name"], opened.tensor(f"{layer['name']}.weight")
        n = int(config[name]["pattern"].removesuffix(":16"))
        assert f"{name}.index" in tensors and f"{name}.mask" not in tensors and layer["bits"] == 4
        assert int((weights.reshape(-1, 16) != 0).sum(1).max()) <= n
        kept[name] = (n, layer["weights"])
    assert len({n for n, _ in kept.values()}) > 1
    mean = sum(n * size for n, size in kept.values()) / sum(size for _, size in kept.values())
    assert mean == pytest.approx(4, abs=0.05)
