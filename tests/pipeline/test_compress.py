"""Whole runs on tiny checkpoints: every shipped recipe, the families of architectures, and what the artefact holds."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lissom
import tiny
from lissom.export import open_model
from lissom.models import Model, Operators
from lissom.pipeline import shipped
from lissom.pipeline.verify import checksum

TEXT = f"calibration.data={tiny.__file__}"  # short, so that tokenising it takes no time
SMALL = ["samples=4", "length=32", TEXT, "group_size=32"]
RUN_TIME = {"activations", "kv-cache"}  # steps that change no weights
IDS = torch.arange(48).reshape(2, 24) * 7 % 300


def run(source, out, recipe, *overrides):
    return lissom.compress(source, out, recipe, overrides=[*SETTINGS.get(recipe, SMALL), *overrides])


SETTINGS = {r: SMALL[:3] for r in ("magnitude", "wanda", "sparsegpt", "uniform", "owl", "loss-clusters",
                                   "equal-marginal", "sparse-2-4", "int8", "flap-healed")}  # fmt: skip
SETTINGS["zeroquant"] = [*SMALL, "zeroquant.steps=4"]


def logits_of(path, fmt):
    from transformers import AutoModelForCausalLM

    model = (
        lissom.load(path, "float32")
        if fmt == "packed"
        else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    )
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_artefact(out, result, unpacked):
    """The loaded model, the decoded layers, the unpacked directory and the manifest all say the same."""
    manifest = json.loads((out / "manifest.json").read_text())
    opened = open_model(out)
    model = Model(opened)
    logits = logits_of(out, manifest["recipe"]["save"]["format"])
    bare = Model(opened)
    bare.operators = Operators()
    if manifest["recipe"]["save"]["format"] != "compressed-tensors":
        model = bare  # transformers knows no operators there
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, model.forward(IDS), atol=2e-4, rtol=2e-4)
    lissom.unpack(out, unpacked, "float32")
    dense = {k: v for file in unpacked.glob("*.safetensors") for k, v in load_file(file).items()}
    zeros = weights = 0
    for row in manifest["layers"]:
        weight = opened.tensor(f"{row['name']}.weight").float()
        assert torch.equal(dense[f"{row['name']}.weight"], weight)
        weight = weight.T.contiguous() if model.architecture.transposed else weight
        assert list(weight.shape) == row["shape"]
        assert checksum(weight) == row["checksum"]
        assert row["sparsity"] == pytest.approx(float((weight == 0).double().mean()))
        zeros, weights = zeros + int((weight == 0).sum()), weights + weight.numel()
    assert manifest["sparsity"] == pytest.approx(zeros / weights)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert manifest["bytes"] == size == sum(manifest["bytes_after"].values())
    assert manifest["bits_per_weight"] == pytest.approx(8 * size / model.parameters_count)
    assert result["bytes"] == size
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".jinja"}
    expected = bare.forward(IDS) if model.operators else logits
    torch.testing.assert_close(logits_of(unpacked, "dense"), expected, atol=2e-4, rtol=2e-4)
    return manifest


def test_the_recipe_whose_operators_only_lissom_runs(trained, tmp_path):
    made = run(trained, tmp_path / "out", "w4a4kv4")
    operators = Model(open_model(tmp_path / "out")).operators
    assert operators.activations and operators.cache and operators.turn_heads and operators.turns
    assert made["folded"][0]["stream_loss"] <= made["folded"][0]["stream_loss_of_hadamard"]
    found, dense = (lissom.evaluate(p, length=64, count=4)["perplexity"] for p in (tmp_path / "out", trained))
    assert dense < found < 1.5 * dense


# the operators of w4a4kv4 only lissom runs (above); ibert is for encoders (test_integer.py)
@pytest.mark.parametrize("recipe", sorted(set(shipped()) - {"w4a4kv4", "ibert"}))
def test_every_shipped_recipe_on_a_trained_llama(trained, tmp_path, recipe):
    out = tmp_path / "out"
    manifest = check_artefact(out, run(trained, out, recipe), tmp_path / "dense")
    bits = {s["bits"] for s in manifest["recipe"]["steps"] if "bits" in s and s["use"] not in RUN_TIME} - {16} or {16}
    solver = next(
        (s for s in reversed(manifest["recipe"]["steps"]) if "bits" in s and s["use"] not in RUN_TIME), {"bits": 16}
    )
    rows = manifest["layers"]
    if solver.get("pattern") == "2:4":
        assert {r["pattern"] for r in rows} == {"2:4"} and manifest["sparsity"] == pytest.approx(0.5, abs=0.01)
    elif wanted := next((s["sparsity"] for s in manifest["recipe"]["steps"] if "sparsity" in s), None):
        # rounding to a grid makes further zeros, pruning alone does not
        assert manifest["sparsity"] >= wanted - 0.01
        if solver["bits"] == 16:
            assert manifest["sparsity"] == pytest.approx(wanted, abs=0.01)
    assert {r["bits"] for r in rows} == bits
    assert manifest["verified"]["layers"].startswith("28 of 28")
    if manifest["recipe"]["save"]["format"] != "packed":
        assert "same logits" in manifest["verified"]["transformers"]


@pytest.mark.parametrize(
    "kind, recipe",
    [
        ("gpt2", "aggressive"), ("gpt2", "sparse-2-4"), ("gpt2", "int4"), ("opt", "aggressive"), ("opt", "wanda"),
        ("bloom", "aggressive"), ("gpt_neox", "int4"), ("gemma3", "aggressive"), ("gemma3", "int4"),
    ],
)  # fmt: skip
def test_main_recipes_on_other_families(random_checkpoint, tmp_path, kind, recipe):
    more = ["group_size=16"] if recipe in ("aggressive", "int4") and kind != "gpt2" else []
    more += ["format=packed"] if kind == "gpt2" else []  # no other format knows Conv1D
    out = tmp_path / "out"
    check_artefact(out, run(random_checkpoint(kind), out, recipe, *more), tmp_path / "dense")


@pytest.mark.parametrize("fmt", ["dense", "packed", "compressed-tensors"])
def test_formats_hold_the_same_weights(trained, tmp_path, fmt):
    lissom.compress(trained, tmp_path / "a", "gptq", overrides=[*SMALL, "format=packed", "dtype=float32"])
    lissom.compress(trained, tmp_path / "b", "gptq", overrides=[*SMALL, f"format={fmt}", "dtype=float32"])
    a, b = open_model(tmp_path / "a"), open_model(tmp_path / "b")
    for i in range(4):
        for layer in Model(a).linears(i):
            assert torch.equal(a.tensor(f"{layer.name}.weight"), b.tensor(f"{layer.name}.weight"))


def test_an_artefact_can_be_compressed_again(trained, tmp_path):
    lissom.compress(trained, tmp_path / "pruned", "sparsegpt", overrides=SMALL[:3])
    result = lissom.compress(tmp_path / "pruned", tmp_path / "both", "rtn", overrides=["bits=8", *SMALL])
    assert result["sparsity"] >= 0.5 - 0.01


def test_ignore_and_only_leave_layers_as_they_were(trained, tmp_path):
    result = lissom.compress(trained, tmp_path / "out", "magnitude", overrides=[*SMALL[:3], "ignore=[o, 'layers.0.']"])
    before, after = open_model(trained), open_model(tmp_path / "out")
    for row in result["layers"]:
        same = torch.equal(before.tensor(f"{row['name']}.weight"), after.tensor(f"{row['name']}.weight"))
        assert same == (row["role"] == "o" or ".layers.0." in row["name"])


def test_a_plan_says_what_will_happen_without_touching_weights(trained):
    plan = lissom.plan(trained, "aggressive")
    rows = plan.describe()["layers"]
    assert len(rows) == 28 and all(r["steps"] == ["alps", "gptq-descent"] and r["bits"] == 4 for r in rows)
    assert plan.model["planned_sparsity"] == pytest.approx(0.7)
    assert all(v > 0 for v in plan.estimates.values())


def test_dead_inputs_work_and_are_reported(random_checkpoint, tmp_path):
    """An input that is zero on every token: its weights become zero, and the manifest counts it."""
    from tiny import build, tiny_tokenizer

    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] = 0  # the first three inputs of q, k, v
    model.save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    result = lissom.compress(tmp_path / "in", tmp_path / "out", "sparsegpt", overrides=SMALL[:3])
    for row in result["layers"]:
        assert row["dead_inputs"] == (3 if row["role"] in "qkv" else 0)
    weight = open_model(tmp_path / "out").tensor("model.layers.0.self_attn.q_proj.weight")
    assert not weight[:, :3].any()


def test_a_gram_matrix_that_is_not_positive_definite_gets_more_damping_and_says_so(trained, tmp_path):
    notes = []
    result = lissom.compress(
        trained,
        tmp_path / "out",
        "sparsegpt",
        note=notes.append,
        overrides=["samples=1", "length=3", "damping=0", TEXT],
    )
    raised = [r for r in result["layers"] if r["damping"] and r["damping"] > 0]
    assert raised, "three tokens cannot fill a Gram matrix of 64 inputs"
    assert any("damping raised" in n and raised[0]["name"] in n for n in notes)
