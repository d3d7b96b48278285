"""Allocations that learn on blocks or measure plans, in a run: what they record is true of the artefact, and a killed search goes on."""

import json

import pytest
import torch

import lissom
import tiny
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import trials
from lissom.pipeline.allocate import needs_held_out
from lissom.pipeline.data import load_calibration

SMALL = ["samples=4", "length=32", f"calibration.data={tiny.__file__}", "dtype=float32"]
SEARCH = {
    "use": "predictor-search",
    "plans": 8,
    "search": 200,
    "rounds": 1,
    "verify": 2,
    "trial_samples": 4,
    "trial_windows": 3,
}


def note(folder, step):
    return json.loads((folder / "manifest.json").read_text())["allocation"][step]


def test_the_recorded_loss_of_the_plan_is_that_of_the_artefact(trained, tmp_path):
    """With the trial's own method as the solver, transformers measures the recorded loss on the same held-out windows."""
    from transformers import AutoModelForCausalLM

    steps = [SEARCH, {"use": "wanda", "sparsity": 0.6}]
    lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    record = note(tmp_path / "out", "wanda")
    told = record["notes"]
    assert told["best"] <= told["uniform"] and len(told["sampled"]) == 7 and told["measured_plans"] == 10
    assert -1 <= told["rounds"][0]["kendall_tau"] <= 1 and len(told["rounds"][0]["measured"]) == 2
    plan = lissom.plan(trained, steps, overrides=SMALL)
    checkpoint = open_model(trained)
    data = load_calibration(checkpoint.tokenizer(), plan.recipe.calibration, 512, needs_held_out(plan))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        loss = float(model(data.held_out[:3], labels=data.held_out[:3]).loss)
    assert loss == pytest.approx(told["best"], rel=1e-4)


def test_a_killed_search_measures_no_plan_twice(trained, tmp_path, monkeypatch):
    steps, whole, calls = [SEARCH, {"use": "sparsegpt", "pattern": "n:8", "sparsity": 0.6}], trials.solve_blocks, []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(trials, "solve_blocks", counting)
    with pytest.raises(KeyboardInterrupt):
        lissom.compress(trained, tmp_path / "a", steps, overrides=[*SMALL, "format=packed"])
    made = lissom.compress(trained, tmp_path / "a", steps, overrides=[*SMALL, "format=packed"])
    assert len(calls) <= 1 + 10  # rounding to 8 may make two plans one
    assert {r["pattern"].partition(":")[2] for r in made["layers"]} == {"8"}
    monkeypatch.undo()
    lissom.compress(trained, tmp_path / "b", steps, overrides=[*SMALL, "format=packed"])
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / n).glob("*.safetensors")} for n in "ab")
    assert a == b and not list((tmp_path / "a").glob("trials*"))


def test_besa_in_a_run_lowers_every_block_and_the_next_sees_it_pruned(trained, tmp_path):
    made = lissom.compress(
        trained, tmp_path / "out", [{"use": "besa", "epochs": 3}, {"use": "wanda", "sparsity": 0.6}], overrides=SMALL
    )
    blocks = {}
    summaries = note(tmp_path / "out", "wanda")["summaries"]
    for r in made["layers"]:
        blocks.setdefault(r["block"], []).append((r["weights"], r["sparsity"], summaries[r["name"]]))
    for layers in blocks.values():
        size = sum(n for n, *_ in layers)
        assert sum(n * s for n, s, _ in layers) / size == pytest.approx(0.6, abs=0.01)  # rows are rounded to weights
        assert sum(n * v["rate"] for n, _, v in layers) / size == pytest.approx(0.6, abs=1e-9)
        assert all(v["block_error"] <= v["block_error_equal"] for *_, v in layers)
    assert any(v["block_error"] < 0.99 * v["block_error_equal"] for layers in blocks.values() for *_, v in layers)
    # the error of the first block, measured on the artefact against the dense model
    plan = lissom.plan(trained, [{"use": "besa"}, {"use": "wanda", "sparsity": 0.6}], overrides=SMALL)
    checkpoint = open_model(trained)
    ids = load_calibration(checkpoint.tokenizer(), plan.recipe.calibration, 512).ids
    dense, pruned = Model(checkpoint), Model(open_model(tmp_path / "out"))
    with torch.no_grad():
        h = dense.embed(ids)
        target, got = dense.load_block(0).forward(h), pruned.load_block(0).forward(h)
    relative = float((got - target).square().sum() / target.square().sum())
    assert relative == pytest.approx(
        blocks[0][0][2]["block_error"], rel=0.15
    )  # Wanda there sees pruned layers of the block


def test_the_plan_counts_trials_and_epochs(trained):
    """Twice the plans, about twice the time that they add."""
    prune = {"use": "wanda", "sparsity": 0.6}

    def seconds(*steps):
        return lissom.plan(trained, [*steps, prune], overrides=SMALL).estimates["seconds"]

    bare = seconds()
    few, many = (seconds({**SEARCH, "plans": n, "rounds": 0}) - bare for n in (1000, 2000))
    assert few > 0 and many == pytest.approx(2 * few, rel=0.2)
    assert seconds({"use": "besa", "epochs": 500}) > seconds({"use": "besa", "epochs": 5}) > bare
