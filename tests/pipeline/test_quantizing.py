"""Pruning and quantization in separate steps, and weights that no grid holds, from recipe to artefact."""

import pytest
import torch

import tiny
from lissom.core import NumericalError, RecipeError
from lissom.export import open_model
from lissom.methods import METHODS
from lissom.models import Model
from lissom.pipeline import compress, read

SMALL = ["samples=2", "length=24", f"calibration.data={tiny.__file__}"]
WEIGHTS_ONLY = [m.name for m in METHODS.values() if m.family == "quantize" and m.kind == "solver"]
QUICK = {"autoround": ["iterations=3"], "omniquant": ["steps=2"], "gptq-descent": ["passes=1"], "quip": ["passes=1"]}


@pytest.fixture(scope="module")
def pruned(random_checkpoint, tmp_path_factory):
    """The tiny model, and the zeros that magnitude pruning makes in one of its layers."""
    source, out = random_checkpoint("llama"), tmp_path_factory.mktemp("pruned") / "out"
    compress(source, out, [{"use": "magnitude", "sparsity": 0.6}], overrides=SMALL)
    return source, open_model(out)


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_a_quantizer_after_a_pruning_step_keeps_every_zero(pruned, tmp_path, name):
    """In the artefact as it is read back: for rotated, low-rank and scaled forms too."""
    source, zeros = pruned
    steps = [{"use": "magnitude", "sparsity": 0.6}, {"use": name, "bits": 4, "group_size": 16}]
    made = compress(source, tmp_path / "out", steps, overrides=[*SMALL, *QUICK.get(name, [])])
    assert made["sparsity"] >= 0.59
    opened = open_model(tmp_path / "out")
    for layer in Model(zeros).linears(1):
        before, after = (c.tensor(f"{layer.name}.weight").float() for c in (zeros, opened))
        assert not bool(after[before == 0].any()) and bool(after[before != 0].any())


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_pruning_after_a_quantizer_is_refused(name):
    with pytest.raises(RecipeError, match="would break its codes"):
        read([{"use": "rtn", "bits": 4}, {"use": name, "sparsity": 0.5}])


def test_groups_that_pruning_emptied_are_zero_and_finite(random_checkpoint, tmp_path):
    """At 95% most groups of 16 hold nothing: their scale must not become 0/0."""
    steps = [{"use": "magnitude", "sparsity": 0.95}, {"use": "gptq-descent", "bits": 2, "group_size": 16}]
    compress(random_checkpoint("llama"), tmp_path / "out", steps, overrides=[*SMALL, "format=packed"])
    model = Model(open_model(tmp_path / "out"))
    block = model.load_block(0)
    for layer in block.linears:
        groups = block.weight(layer.name).reshape(-1, 16)
        assert bool(torch.isfinite(groups).all()) and bool((groups == 0).all(1).any())


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_scales_beyond_half_precision_end_with_a_clear_error(random_checkpoint, tmp_path, name):
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "model"
    shutil.copytree(random_checkpoint("llama"), source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e8
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"overflows half precision[^`]*`ignore`"):
        compress(source, tmp_path / "out", [{"use": name, "bits": 4, "group_size": 16}], overrides=SMALL)
    compress(
        source, tmp_path / "out2", [{"use": name, "bits": 4, "group_size": 16, "ignore": ["down"]}], overrides=SMALL
    )
