"""Allocation within a run: the spread is chosen by true held-out loss, and spread 0 is the uniform recipe bit for bit."""

import dataclasses
import json

import pytest
import torch

import lissom
import tiny
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline.allocate import budgets_for, needs_held_out
from lissom.pipeline.data import load_calibration
from lissom.pipeline.planning import allocation_samples
from lissom.pipeline.trials import trial_loss

SMALL = ["samples=4", "length=32", "sparsity=0.7", f"calibration.data={tiny.__file__}"]


def weights_of(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


@pytest.mark.parametrize("recipe", ["loss-clusters", "owl", "equal-marginal"])
def test_spread_zero_is_the_uniform_recipe_byte_for_byte(trained, tmp_path, recipe):
    lissom.compress(trained, tmp_path / "a", "uniform", overrides=SMALL)
    lissom.compress(trained, tmp_path / "b", recipe, overrides=[*SMALL, "spread=0"])
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


@pytest.mark.parametrize("recipe", ["loss-clusters", "owl", "equal-marginal"])
def test_a_spread_changes_budgets_and_keeps_the_mean(trained, tmp_path, recipe):
    result = lissom.compress(trained, tmp_path / "b", recipe, overrides=[*SMALL, "spread=0.1"])
    budgets = {round(r["sparsity"], 3) for r in result["layers"]}
    assert len(budgets) > 1
    assert result["sparsity"] == pytest.approx(0.7, abs=2e-3)


def test_auto_takes_the_spread_with_the_smallest_true_loss_on_held_out_text(trained, tmp_path):
    """The recorded loss of the winner is what transformers says about the finished artefact."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    overrides = [*SMALL, "spread=auto", "spreads=[0, 0.1, 0.3]", "allocation_samples=4"]
    plan = lissom.plan(trained, "loss-clusters", overrides=overrides)
    lissom.compress(trained, out, "loss-clusters", overrides=overrides)
    record = json.loads((out / "manifest.json").read_text())["allocation"]["sparsegpt"]
    trials = {float(k): v for k, v in record["held_out_loss_by_spread"].items()}
    assert set(trials) == {0.0, 0.1, 0.3}
    chosen = record["settings"]["spread"]
    assert trials[chosen] == min(trials.values()) <= trials[0.0]
    checkpoint = open_model(trained)
    data = load_calibration(checkpoint.tokenizer(), plan.recipe.calibration, 512, needs_held_out(plan))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = float(model(data.held_out, labels=data.held_out).loss)
    assert loss == pytest.approx(trials[chosen], rel=1e-4)


def test_held_out_text_never_feeds_the_statistics(trained):
    """Other held-out windows, same budgets and statistics: only the measured loss differs."""
    plan = lissom.plan(trained, "loss-clusters", overrides=SMALL)
    model = Model(open_model(trained))
    data = load_calibration(model.checkpoint.tokenizer(), plan.recipe.calibration, 512, 4)
    budgets, _ = budgets_for(model, plan, data)
    swapped = dataclasses.replace(data, held_out=data.held_out.flip(0))
    assert trial_loss(model, plan, budgets, data) == pytest.approx(trial_loss(model, plan, budgets, swapped), rel=1e-6)
    assert budgets_for(model, plan, swapped)[0] == budgets
    other = dataclasses.replace(data, held_out=data.held_out.flip(1))
    assert trial_loss(model, plan, budgets, data) != pytest.approx(trial_loss(model, plan, budgets, other), rel=1e-3)
    starts = {tuple(row[:8].tolist()) for row in data.ids}
    assert not starts & {tuple(row[:8].tolist()) for row in data.held_out}


def test_the_share_of_the_stream_is_what_each_block_of_transformers_writes(trained):
    """Against hidden states that transformers itself returns, token by token."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_model(trained)
    model, plan = Model(checkpoint), lissom.plan(trained, "loss-clusters", overrides=SMALL)
    data = load_calibration(checkpoint.tokenizer(), plan.recipe.calibration, model.config.vocab_size)
    _, record = budgets_for(model, plan, data)
    summaries = record["sparsegpt"]["summaries"]
    ids = data.ids[: allocation_samples(plan.recipe)]
    reference = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    outputs = []
    for layer in reference.model.layers:
        layer.register_forward_hook(
            lambda _m, given, got: outputs.append((given[0], got[0] if isinstance(got, tuple) else got))
        )
    with torch.no_grad():
        reference(ids)
    for block, (before, after) in enumerate(outputs):
        shares = sorted(
            float((b - a).norm() ** 2 / b.norm() ** 2)
            for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
        )
        middle = shares[(len(shares) - 1) // 2]
        mine = [v["share"] for name, v in summaries.items() if f"layers.{block}." in name]
        assert mine and mine == pytest.approx([middle] * len(mine), rel=1e-3)
