"""Predictor search over structured plans: exact means, the recorded loss is the artefact's, a killed search goes on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lissom
import tiny
from lissom.core import RecipeError
from lissom.export import open_model
from lissom.pipeline import structured_search
from lissom.pipeline.allocate import needs_held_out
from lissom.pipeline.data import load_calibration
from lissom.pipeline.recipe import read
from lissom.pipeline.structured_search import count_units

SMALL = ["calibration.samples=4", "length=32", f"calibration.data={tiny.__file__}", "dtype=float32"]
SEARCH = {"use": "predictor-search", "plans": 8, "search": 200, "rounds": 1, "verify": 2, "trial_windows": 3}
FLAP = {"use": "flap", "keep_neurons": 0.5, "spread": 0.25, "bias": False}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), blocks=st.integers(1, 12), mean=st.integers(2, 40), room=st.integers(0, 10))
def test_counts_add_up_and_stay_within_their_bounds(seed, blocks, mean, room):
    wanted = mean + np.random.default_rng(seed).normal(size=blocks) * room
    counts = count_units(wanted.tolist(), mean, mean + room)
    assert sum(counts) == mean * blocks and max(counts) <= mean + room and min(counts) >= max(1, mean - room)
    if room and abs(wanted - mean).max() < room - 1 and abs(wanted.sum() - mean * blocks) < 1e-9:
        assert max(abs(c - w) for c, w in zip(counts, wanted, strict=True)) <= 1


def test_the_best_plan_keeps_the_mean_and_its_loss_is_that_of_the_artefact(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    steps = [SEARCH, {**FLAP, "keep_heads": 1.0}]
    made = lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    kept = [len(v) for v in made["structured"][0]["neurons"].values()]
    told = made["structured"][0]["search"]
    assert sum(kept) == 4 * 64 and max(kept) <= 96 and len(set(kept)) > 1
    assert told["best"] < told["uniform"] and told["measured_plans"] == 10
    plan = lissom.plan(trained, steps, overrides=SMALL)
    data = load_calibration(open_model(trained).tokenizer(), plan.recipe.calibration, 512, needs_held_out(plan))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        loss = float(model(data.held_out[:3], labels=data.held_out[:3]).loss)
    assert loss == pytest.approx(told["best"], rel=1e-4)


def test_a_killed_search_measures_no_plan_twice(trained, tmp_path, monkeypatch):
    whole, calls = structured_search.token_losses, []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(structured_search, "token_losses", counting)
    steps = [SEARCH, FLAP, {"use": "magnitude", "sparsity": 0.5}]
    with pytest.raises(KeyboardInterrupt):
        lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    assert len(calls) <= 1 + 3 * 10 and not (tmp_path / "out" / "smaller").exists()


@pytest.mark.parametrize(
    "steps, words",
    [
        ([{"use": "owl"}, FLAP], "owl before it shares the budget"),
        ([SEARCH, {**FLAP, "spread": 0.0}], "give flap a spread"),
        ([SEARCH, {"use": "shortgpt", "keep_blocks": 0.5}], "directly before"),
    ],
)
def test_searches_in_the_wrong_place_are_refused(steps, words):
    with pytest.raises(RecipeError, match=words):
        read(steps)
