"""Block steps in the stream: quality, exact zeros, resume with both streams, recipes that cannot work."""

import json
import math

import pytest
import torch

from lissom.core import RecipeError
from lissom.evaluate import evaluate
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress
from lissom.pipeline.blockwise import forward_of
from lissom.pipeline.recipe import read

SMALL = ["calibration.samples=24", "calibration.length=48"]
STEPS = [{"use": "sparsegpt", "sparsity": 0.7}, {"use": "reconstruct", "epochs": 3, "learning_rate": 3e-3}]


@pytest.fixture(scope="module")
def healed(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "out"
    return out, compress(trained, out, STEPS, overrides=SMALL)


def test_it_wins_back_perplexity_and_keeps_every_zero(trained, healed, tmp_path):
    out, manifest = healed
    plain = compress(trained, tmp_path / "plain", STEPS[:1], overrides=SMALL)
    dense, pruned, better = (
        math.log(evaluate(p, length=64, count=8)["perplexity"]) for p in (trained, tmp_path / "plain", out)
    )
    assert better - dense < 0.6 * (pruned - dense)
    assert manifest["sparsity"] == pytest.approx(plain["sparsity"], abs=1e-4)
    for row in manifest["layers"]:
        assert row["healed"]["after"] <= row["healed"]["before"]
    assert all(row["healed"] is None for row in plain["layers"])


def test_killed_between_blocks_it_goes_on_to_the_same_bytes(trained, healed, tmp_path):
    out, manifest = healed

    def stop(label, done, total):
        if (label, done) == ("compress", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(trained, tmp_path / "again", STEPS, overrides=SMALL, tick=stop)
    again = compress(trained, tmp_path / "again", STEPS, overrides=SMALL)
    for file in sorted(out.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert json.loads(json.dumps(again["layers"])) == json.loads(json.dumps(manifest["layers"]))


def test_joint_sparse_and_quantized_layers_stay_on_their_grid(trained, tmp_path):
    steps = [{"use": "sparsegpt", "pattern": "4:16", "bits": 4, "group_size": 32}, STEPS[1]]
    manifest = compress(
        trained, tmp_path / "out", steps, overrides=[*SMALL, "format=packed"]
    )  # verified on loading back
    assert {row["bits"] for row in manifest["layers"]} == {4}
    assert min(row["sparsity"] for row in manifest["layers"]) >= 0.75
    first = manifest["layers"][0]["healed"]
    assert first["after"] < first["before"]


def test_forward_of_a_block_takes_other_weights_and_leaves_the_block_alone(trained):
    block = Model(open_model(trained)).load_block(1)
    h = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    before, forward = block.forward(h), forward_of(block)
    name = block.linears[0].name
    other = forward({name: torch.zeros_like(block.weight(name))}, h)
    assert torch.equal(forward({}, h), before) and torch.equal(block.forward(h), before)
    assert not torch.allclose(other, before)
    block.set_weight(name, torch.zeros_like(block.weight(name)))
    assert torch.equal(block.forward(h), other) and torch.equal(forward({}, h), before)


@pytest.mark.parametrize("steps", [STEPS[1:], [STEPS[1], STEPS[0]]])
def test_a_block_step_without_solved_layers_is_refused(steps):
    with pytest.raises(RecipeError, match="reconstruct works on"):
        read(steps)


def test_settings_are_checked_by_read():
    with pytest.raises(RecipeError, match="epochs"):
        read([STEPS[0], {"use": "reconstruct", "epochs": 0}])
