"""Folded models are the same function, in every architecture in which a fold is exact; the others are refused in the plan."""

import pytest
import torch

from lissom.core import RecipeError
from lissom.export import open_model
from lissom.models import Model
from lissom.models.folds import rotation_refusal
from lissom.pipeline import compress, plan
from lissom.pipeline.folding import folded_model
from lissom.pipeline.operating import operated
from lissom.pipeline.recipe import read
from tiny import KINDS, tiny_model

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
BITS = {"use": "rtn", "bits": 4, "group_size": 16}
STEPS = {
    "smoothquant": {"use": "smoothquant", "alpha": 0.7},
    "smoothquant searched": {"use": "smoothquant", "alpha": "search"},
    "awq": {"use": "awq"},
    "quarot": {"use": "quarot", "online": True},
    "quarot values": {"use": "quarot", "stream": False},
    "spinquant": {"use": "spinquant", "online": True, "steps": 3, "tokens": 16},
}
DECODERS = sorted(k for k in KINDS if k != "bert")


def folds(kind, step, model):
    """Whether the kind can take the step at all."""
    if step in ("quarot", "spinquant"):
        return rotation_refusal(model.architecture, model.config) is None
    return True


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", DECODERS)
def test_the_folded_model_gives_the_same_logits(kind, step, tmp_path):
    tiny_model(kind, tmp_path / "dense")
    model = Model(open_model(tmp_path / "dense"))
    recipe = read([STEPS[step], BITS])
    if not folds(kind, step, model):
        with pytest.raises(RecipeError, match="cannot be turned"):
            plan(tmp_path / "dense", recipe)
        return
    before = model.forward(IDS)
    made, notes = folded_model(model, recipe, IDS, tmp_path / "folded")
    torch.testing.assert_close(made.forward(IDS), before, atol=1e-4, rtol=1e-4)
    old, new = model.load_block(1), made.load_block(1)
    changed = {la.role for la in old.linears if not torch.equal(old.weight(la.name), new.weight(la.name))}
    assert changed, "nothing was folded"
    assert notes[0]["step"] == step.split()[0]
    if step in ("quarot", "spinquant"):
        assert changed == {la.role for la in old.linears}
        bare = Model(open_model(tmp_path / "folded" / "0"))
        assert not torch.allclose(bare.forward(IDS), before, atol=1e-3)  # without the operator it is another model
    again, _ = folded_model(model, recipe, IDS, tmp_path / "folded")  # what is complete is not done again
    assert torch.equal(again.forward(IDS), made.forward(IDS))


def test_smoothing_levels_activations_and_all_folds_compose(tmp_path):
    tiny_model("llama-tied", tmp_path / "dense")
    model = Model(open_model(tmp_path / "dense"))
    recipe = read([STEPS["quarot"], {"use": "smoothquant", "ignore": ["o"]}, BITS])
    made, notes = folded_model(model, recipe, IDS, tmp_path / "folded")
    torch.testing.assert_close(made.forward(IDS), model.forward(IDS), atol=1e-4, rtol=1e-4)
    peaks = list(notes[1]["layers"].values())
    assert sum(p["activation_peak_smooth"] < p["activation_peak"] for p in peaks) > len(peaks) / 2
    assert not any(name.endswith("o_proj") for name in notes[1]["layers"])
    assert not made.tied and model.tied
    # down's input is rotated at run time: no factor can go through the rotation into up
    assert not any(name.endswith("down_proj") for name in notes[1]["layers"])
    assert any("down: its input is rotated" in w for w in plan(tmp_path / "dense", recipe).warnings)


@pytest.mark.parametrize("step", ["smoothquant", "awq", "quarot"])
def test_artefacts_of_folded_models_load_and_verify(trained, tmp_path, step):
    steps = [
        STEPS[step] | ({"online": False} if step == "quarot" else {}),
        BITS | {"group_size": 32, "symmetric": True},
    ]
    made = compress(
        trained, tmp_path / "out", steps,
        overrides=["samples=4", "length=32", f"calibration.data={__file__}", "format=compressed-tensors"],
    )  # fmt: skip
    assert "same logits" in made["verified"]["transformers"]
    assert made["folded"][0]["step"] == step


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([BITS, {"use": "smoothquant"}], "before they are compressed"),
        ([BITS, {"use": "quarot"}], "before they are compressed"),
        ([{"use": "awq"}, {"use": "magnitude", "sparsity": 0.5}], "no later step has bits"),
        ([{"use": "smoothquant", "sparsity": 0.5}, BITS], "does not prune"),
        ([{"use": "quarot", "stream": False, "values": False}, BITS], "nothing is turned"),
    ],
)
def test_mistakes(random_checkpoint, steps, words):
    with pytest.raises(RecipeError, match=words):
        plan(random_checkpoint("llama"), steps)


def test_what_cannot_be_folded_is_refused_when_asked_for_and_said_otherwise(random_checkpoint):
    with pytest.raises(RecipeError, match="GELU"):
        plan(random_checkpoint("gpt_neox"), [{"use": "smoothquant", "only": ["down"]}, BITS])
    made = plan(random_checkpoint("gpt_neox"), [{"use": "smoothquant"}, BITS])
    assert any("not folded for down" in w for w in made.warnings)
    with pytest.raises(RecipeError, match="online"):
        plan(
            random_checkpoint("llama"),
            [{"use": "quarot", "online": True}, BITS],
            overrides=["format=compressed-tensors"],
        )


def test_a_dense_model_is_left_as_it_was(random_checkpoint, tmp_path):
    model = Model(open_model(random_checkpoint("llama")))
    other = operated(model, read([BITS, {"use": "activations"}]), IDS, tmp_path / "cache.json")
    assert other.operators.activations is not None and not model.operators
