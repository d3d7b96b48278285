"""Smaller models: masked and sliced give equal logits in every architecture, and transformers loads what is written."""

import pytest
import torch

from lissom.core import RecipeError
from lissom.evaluate import evaluate
from lissom.export import open_model
from lissom.models import Model
from lissom.models.units import KINDS, masked, refusal, smaller_block, smaller_config, units_of
from lissom.pipeline import compress, plan
from lissom.pipeline.recipe import read
from tiny import KINDS as MODELS
from tiny import tiny_model

SMALL = ["calibration.samples=6", "calibration.length=24"]


def _logits(model, blocks, ids):
    h = model.embed(ids)
    for block in blocks:
        h = block.forward(h)
    return model.head(h)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_masked_and_sliced_models_give_equal_logits(kind, tmp_path):
    tiny_model(kind, tmp_path)
    model = Model(open_model(tmp_path))
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    row, config = model.architecture, model.config
    allowed = [k for k in KINDS if refusal(row, config, k) is None]
    keep: dict[str, torch.Tensor] = {}
    for k in allowed:
        count = units_of(row, config, model.linears(0), k).count
        keep[k] = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: count // 2].sort().values
    small = smaller_config(
        row, config, *(len(keep[k]) if k in keep else None for k in KINDS), range(config.num_hidden_layers)
    )
    zeroed, cut = [], []
    for i in range(model.blocks):
        units = {k: units_of(row, config, model.linears(i), k) for k in allowed}
        block = model.load_block(i)
        smaller = smaller_block(block, {k: (units[k], keep[k]) for k in allowed})
        for k in allowed:
            block.parameters = masked(block.parameters, units[k], keep[k])
        zeroed.append(block)
        other = type(block)(row, small, i, model.prefix, (), smaller)
        cut.append(other)
        removed = sum(v.numel() for n, v in block.parameters.items() if n.endswith("weight")) - sum(
            v.numel() for n, v in smaller.items() if n.endswith("weight")
        )
        assert removed == sum(u.size * (u.count - len(keep[k])) for k, u in units.items())
    assert torch.allclose(_logits(model, zeroed, ids), _logits(model, cut, ids), atol=1e-5)
    assert allowed or kind.startswith("bloom")


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "qwen3", "smollm3", "gemma3", "phi3", "phi", "gpt2", "opt", "mistral", "qwen2"]
)
def test_transformers_loads_the_smaller_model(kind, tmp_path):
    tiny_model(kind, tmp_path / "dense")
    model = Model(open_model(tmp_path / "dense"))
    heads = 0.5 if refusal(model.architecture, model.config, "heads") is None else 1.0
    step = {"use": "flap", "keep_heads": heads, "keep_neurons": 0.5}
    made = compress(tmp_path / "dense", tmp_path / "out", [step], overrides=SMALL)
    assert "same logits" in made["verified"]["transformers"]
    assert made["bytes"] < made["dense_bytes"]
    kept = made["structured"][0]
    assert {len(v) for v in kept["neurons"].values()} == {Model(open_model(tmp_path / "out")).load_block(0).sizes.inner}


def test_gradients_beat_magnitude_and_a_bias_repairs_the_mean(trained, tmp_path):
    quality = {}
    for name, extra in {
        "structured-magnitude": {},
        "llm-pruner": {},
        "flap": {},
        "flap plain": {"bias": False},
        "surgeon-units": {},
        "surgeon-units plain": {"update": False},
    }.items():
        step = {"use": name.split()[0], "keep_neurons": 0.25, **extra}
        compress(trained, tmp_path / name, [step], overrides=SMALL)
        quality[name] = evaluate(tmp_path / name, length=64, count=60)["perplexity"]
    assert quality["llm-pruner"] < quality["structured-magnitude"], quality
    assert quality["flap"] < quality["flap plain"], quality
    assert quality["surgeon-units"] < min(quality["flap"], quality["surgeon-units plain"]), quality


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_a_surgeon_cuts_heads_and_neurons_whose_number_differs_by_block(kind, tmp_path):
    tiny_model(kind, tmp_path / "dense")
    heads = 1.0 if kind == "gpt2" else 0.5
    step = {"use": "surgeon-units", "keep_heads": heads, "keep_neurons": 0.5, "spread": 0.25, "rounds": 5}
    made = compress(tmp_path / "dense", tmp_path / "out", [step], overrides=SMALL)
    assert "same logits" in made["verified"]["transformers"]
    kept = [len(v) for v in made["structured"][0]["neurons"].values()]
    assert sum(kept) == len(kept) * Model(open_model(tmp_path / "dense")).load_block(0).sizes.inner // 2


def test_shortgpt_removes_the_blocks_of_least_influence(trained, tmp_path):
    made = compress(trained, tmp_path / "out", [{"use": "shortgpt", "keep_blocks": 0.5}], overrides=SMALL)
    record = made["structured"][0]
    worst = sorted(range(4), key=lambda i: record["influence"][i])[:2]
    assert record["blocks"] == [i for i in range(4) if i not in worst]
    old, new = Model(open_model(trained)), Model(open_model(tmp_path / "out"))
    assert new.blocks == 2
    a, b = old.load_block(record["blocks"][1]), new.load_block(1)
    assert torch.equal(a.weight(a.linears[0].name), b.weight(b.linears[0].name))


def test_a_smaller_model_goes_on_through_the_rest_of_the_recipe_and_heals(trained, tmp_path):
    steps = [
        {"use": "llm-pruner", "keep_heads": 0.5, "keep_neurons": 0.5},
        {"use": "sparsegpt", "pattern": "2:4"},
        {
            "use": "heal",
            "steps": 6,
            "batch": 4,
            "length": 24,
            "evaluate_every": 3,
            "held_out": 2,
            "learning_rate": 2e-3,
        },
    ]

    def stop(label, done, total):
        if (label, done) == ("compress", 2):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(trained, out, steps, overrides=SMALL, tick=stop)
    made = compress(trained, out, steps, overrides=SMALL)
    history = made["healing"]["heal"]
    assert history[-1]["held_out"] < history[0]["held_out"]
    assert {r["pattern"] for r in made["layers"]} == {"2:4"} and not (out / "smaller").exists()
    assert plan(trained, steps).layers[-1]["shape"] == made["layers"][-1]["shape"] == [64, 64]


@pytest.mark.parametrize(
    "kind, step, words",
    [
        ("llama", {"use": "flap", "keep_heads": 0.1}, "leaves none"),
        ("llama", {"use": "flap", "keep_neurons": 0.0}, "above 0 and at most 1"),
        ("llama", {"use": "flap", "keep_neurons": 1.0}, "nothing is removed"),
        ("gpt2", {"use": "head-importance", "keep_heads": 0.5}, "no head size of its own"),
        ("bloom", {"use": "flap", "keep_heads": 0.5, "keep_neurons": 0.5}, "slopes"),
        ("bloom", {"use": "flap", "keep_neurons": 0.5}, "no size of the MLP"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_the_plan(kind, step, words, tmp_path):
    tiny_model(kind, tmp_path)
    with pytest.raises(RecipeError, match=words):
        plan(tmp_path, [step])


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do(tmp_path):
    tiny_model("llama", tmp_path, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(
        RecipeError, match=r"3 query heads over 3 KV heads and a width of 32 .*keep_heads may be 0.25, 0.5, 1"
    ):
        plan(tmp_path, [{"use": "flap", "keep_heads": 0.75}])
    plan(tmp_path, [{"use": "flap", "keep_heads": 0.5}])


def test_structured_steps_come_first():
    with pytest.raises(RecipeError, match="must come before every other"):
        read([{"use": "wanda", "sparsity": 0.5}, {"use": "flap"}])
