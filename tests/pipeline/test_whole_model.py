"""Options of the whole model: global comparison, several shots, no text, units – each in a run, against its definition."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lissom
import tiny
from lissom.core import RecipeError
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline.data import load_calibration
from lissom.pipeline.recipe import read

SMALL = ["samples=4", "length=32", f"calibration.data={tiny.__file__}", "dtype=float32"]


def weights(folder):
    model = Model(open_model(folder))
    return {la.name: model.load_block(i).weight(la.name) for i in range(model.blocks) for la in model.linears(i)}


def files(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


def test_magnitude_compared_over_all_layers_is_one_sort_of_the_model(trained, tmp_path):
    lissom.compress(
        trained, tmp_path / "out", [{"use": "magnitude", "sparsity": 0.6, "per": "global"}], overrides=SMALL
    )
    dense, pruned = weights(trained), weights(tmp_path / "out")
    everything = torch.cat([w.abs().flatten() for w in dense.values()])
    threshold = everything.sort().values[round(0.6 * len(everything))]
    for name, w in pruned.items():
        exact = float((dense[name].abs() < threshold).double().mean())
        assert float((w == 0).double().mean()) == pytest.approx(exact, abs=0.005)
    zeros = sum(int((w == 0).sum()) for w in pruned.values())
    assert zeros == pytest.approx(0.6 * len(everything), abs=len(pruned))


@pytest.mark.parametrize("use", ["wanda", "sparsegpt", "gblm"])
def test_global_comparison_runs_with_what_the_score_needs(trained, tmp_path, use):
    made = lissom.compress(
        trained, tmp_path / "out", [{"use": use, "sparsity": 0.5, "per": "global"}], overrides=[*SMALL, "samples=2"]
    )
    assert made["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert len({round(r["sparsity"], 2) for r in made["layers"]}) > 3
    assert made["allocation"][use]["allocation"] == "global-threshold"


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_one_shot_of_several_is_the_plain_run_and_zeros_grow(trained, tmp_path, schedule):
    """Magnitudes of weights that never move: the zeros of three shots are those of one."""
    step = {"use": "magnitude", "sparsity": 0.6}
    lissom.compress(trained, tmp_path / "one", [step], overrides=SMALL)
    lissom.compress(trained, tmp_path / "three", [{**step, "shots": 3, "schedule": schedule}], overrides=SMALL)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_shots_take_statistics_of_the_model_as_it_is_then(trained, tmp_path):
    """Two shots by hand: a run to half of the sparsity, and from its result a run to all of it."""
    step = {"use": "wanda", "sparsity": 0.6}
    lissom.compress(trained, tmp_path / "both", [{**step, "shots": 2}], overrides=SMALL)
    lissom.compress(trained, tmp_path / "half", [{**step, "sparsity": 0.3}], overrides=SMALL)
    lissom.compress(tmp_path / "half", tmp_path / "whole", [step], overrides=SMALL)
    lissom.compress(trained, tmp_path / "once", [step], overrides=SMALL)
    both, whole, half, once = (weights(tmp_path / n) for n in ("both", "whole", "half", "once"))
    assert all(torch.equal(both[n], whole[n]) for n in both)
    assert all(not both[n][half[n] == 0].any() for n in both)
    assert any(not torch.equal(both[n], once[n]) for n in both)


def test_error_feedback_brings_no_weight_back_that_an_earlier_shot_removed(trained, tmp_path):
    step = {"use": "sparsegpt", "sparsity": 0.6, "only": ["q", "down"], "block": 16}  # later blocks see feedback first
    lissom.compress(trained, tmp_path / "both", [{**step, "shots": 2, "schedule": "cubic"}], overrides=SMALL)
    lissom.compress(trained, tmp_path / "half", [{**step, "sparsity": 0.6 * (1 - 0.5**3)}], overrides=SMALL)
    both, half = (weights(tmp_path / n) for n in ("both", "half"))
    assert all(not both[n][half[n] == 0].any() for n in both)
    assert any(int((both[n] != half[n])[half[n] != 0].sum()) for n in both)  # what remains moves again


def test_shots_with_budgets_gradients_and_a_grid_at_the_end(trained, tmp_path):
    step = {
        "use": "llm-surgeon",
        "sparsity": 0.6,
        "per": "global",
        "shots": 2,
        "bits": 4,
        "group_size": 32,
        "only": "q",
    }
    made = lissom.compress(
        trained, tmp_path / "out", [step], overrides=[*SMALL, "samples=2", "format=packed", "steps=1"]
    )
    layers = [r for r in made["layers"] if r["role"] == "q"]
    zeros = sum(r["sparsity"] * r["weights"] for r in layers) / sum(r["weights"] for r in layers)
    assert zeros >= 0.6 - 2e-3 and {r["bits"] for r in layers} == {4} and len({r["sparsity"] for r in layers}) > 1
    assert not (tmp_path / "out" / "shots").exists()


def test_n_of_m_in_shots_with_budgets_of_each_layer(trained, tmp_path):
    steps = [{"use": "loss-clusters"}, {"use": "sparsegpt", "sparsity": 0.7, "pattern": "n:16", "shots": 2}]
    made = lissom.compress(trained, tmp_path / "out", steps, overrides=[*SMALL, "format=packed"])
    assert {r["pattern"].split(":")[1] for r in made["layers"]} == {"16"} and len(
        {r["pattern"] for r in made["layers"]}
    ) > 1
    assert made["sparsity"] == pytest.approx(0.7, abs=0.03)


def test_n_of_m_by_row_in_shots_with_int4_behind_it(trained, tmp_path):
    """Each row of what was saved keeps equally many of each 16 inputs, rows keep unequally, and rows by Fisher may be compared."""
    steps = [
        {"use": "loss-clusters"},
        {"use": "sparsegpt", "sparsity": 0.7, "pattern": "n:16 by row", "shots": 2, "row_fisher": 0.5},
        {"use": "gptq", "bits": 4, "group_size": 32},
    ]
    made = lissom.compress(trained, tmp_path / "out", steps, overrides=[*SMALL, "format=packed"])
    assert {r["pattern"] for r in made["layers"]} == {"n:16"}
    assert made["sparsity"] == pytest.approx(0.7, abs=0.01)
    saved = open_model(tmp_path / "out")
    for r in made["layers"]:
        layer = saved.layer(r["name"])
        kept = layer.mask.reshape(len(layer.mask), -1, 16).sum(2)
        assert bool((kept == kept[:, :1]).all()) and len(kept.unique()) > 1
        assert not layer.weight[~layer.mask].any()


def test_recipe_sparse_n_16_packs_an_n_for_each_row(trained, tmp_path):
    made = lissom.compress(
        trained, tmp_path / "out", "sparse-n-16", overrides=[*SMALL, f"calibration.data={tiny.__file__}"]
    )
    assert made["sparsity"] == pytest.approx(0.75, abs=0.02)
    stored = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    for r in made["layers"]:
        assert r["pattern"] == "n:16" and r["bits"] == 4
        assert {f"{r['name']}.kept", f"{r['name']}.index"} <= stored and f"{r['name']}.mask" not in stored


def test_a_run_of_shots_that_is_killed_ends_with_the_same_bytes(trained, tmp_path, monkeypatch):
    from lissom.pipeline import shots

    steps, whole = [{"use": "wanda", "sparsity": 0.6, "shots": 3}], shots.solve_blocks
    lissom.compress(trained, tmp_path / "a", steps, overrides=SMALL)
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(shots, "solve_blocks", stopping)
    with pytest.raises(KeyboardInterrupt):
        lissom.compress(trained, tmp_path / "b", steps, overrides=SMALL)
    lissom.compress(trained, tmp_path / "b", steps, overrides=SMALL)
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(calls) == 3  # the first shot is not done again


@pytest.mark.parametrize(
    "steps, same",
    [
        ([{"use": "wanda", "sparsity": 0.5}], [{"use": "magnitude", "sparsity": 0.5, "per": "row"}]),
        ([{"use": "sparsegpt", "sparsity": 0.5, "damping": 0.0}], None),
        ([{"use": "loss-clusters"}, {"use": "refit", "sparsity": 0.5}], None),
        ([{"use": "channel-permutation"}, {"use": "ria", "pattern": "2:4"}], None),
    ],
)
def test_without_text_inputs_are_white(trained, tmp_path, steps, same):
    """Wanda is then magnitude by row, bit for bit; whatever the calibration file would hold does not matter."""
    text_free = [*SMALL[2:], "calibration.data=none"]
    made = lissom.compress(trained, tmp_path / "a", steps, overrides=text_free)
    assert "agree" in made["verified"]["forward"]
    assert made["sparsity"] == pytest.approx(0.5, abs=2e-3)
    if same:
        lissom.compress(trained, tmp_path / "b", same, overrides=SMALL)
        assert files(tmp_path / "a") == files(tmp_path / "b")
    else:
        lissom.compress(trained, tmp_path / "b", steps, overrides=[*text_free, "samples=7"])
        assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("unit, axis", [("row", 1), ("column", 0)])
def test_rows_and_columns_go_as_a_whole(trained, tmp_path, unit, axis):
    steps = [{"use": "alps", "sparsity": 0.25, "unit": unit}]
    lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    for w in weights(tmp_path / "out").values():
        gone = (w == 0).all(axis)
        assert float(gone.double().mean()) == pytest.approx(0.25, abs=0.02)
        rows, columns = (w == 0).all(1), (w == 0).all(0)  # rows that went before leave inputs that are always zero
        assert torch.equal(w == 0, rows[:, None] | columns)


def test_blocks_of_weights_in_a_run(trained, tmp_path):
    steps = [{"use": "sparsegpt", "sparsity": 0.5, "unit": "4x8"}, {"use": "refit"}]
    made = lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL)
    assert made["sparsity"] == pytest.approx(0.5, abs=1e-3)
    for w in weights(tmp_path / "out").values():
        tiles = (w == 0).reshape(w.shape[0] // 4, 4, w.shape[1] // 8, 8).double().mean((1, 3))
        assert set(tiles.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "steps, words",
    [
        ([{"use": "wanda", "sparsity": 0.5, "unit": "3y4"}], "4x1 or 1x16"),
        ([{"use": "wanda", "pattern": "2:4", "unit": "4x1"}], "two patterns"),
        ([{"use": "wanda", "sparsity": 0.5, "unit": "row", "per": "row"}], "leave out per"),
        ([{"use": "wanda", "sparsity": 0.5, "unit": "4x1"}, {"use": "dsnot"}], "exchanges single weights"),
        ([{"use": "l-obs", "sparsity": 0.5, "unit": "row"}], "one weight at a time"),
        ([{"use": "oats", "sparsity": 0.5, "per": "global"}], "no score"),
        ([{"use": "owl"}, {"use": "wanda", "sparsity": 0.5, "per": "global"}], "shares the same budget"),
        ([{"use": "wanda", "pattern": "2:4", "per": "global"}], "nothing to share"),
        ([{"use": "wanda", "sparsity": 0.5, "shots": 0}], "1 or more"),
        ([{"use": "oats", "sparsity": 0.5, "shots": 2}], "no zeros to go on from"),
        (
            [{"use": "wanda", "sparsity": 0.5, "shots": 2, "only": "q"}, {"use": "ria", "sparsity": 0.5, "only": "k"}],
            "same shots",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(steps, words):
    with pytest.raises(RecipeError, match=words):
        read(steps)


@pytest.mark.parametrize(
    "steps, words",
    [
        ([{"use": "gblm", "sparsity": 0.5}], "gblm learns from text"),
        ([{"use": "wanda", "sparsity": 0.5}, {"use": "reconstruct"}], "reconstruct learns from text"),
        ([{"use": "owl", "spread": "auto"}, {"use": "wanda", "sparsity": 0.5}], "held-out text"),
    ],
)
def test_without_text_nothing_is_learned_from_it(steps, words):
    with pytest.raises(RecipeError, match=words):
        read(steps, ["calibration.data=none"])


def test_without_text_what_the_run_rounds_by_token_is_allowed():
    assert read([{"use": "wanda", "sparsity": 0.5}, {"use": "kv-cache"}], ["calibration.data=none"]).steps
    with pytest.raises(RecipeError, match="kv-cache learns from text"):
        read([{"use": "wanda", "sparsity": 0.5}, {"use": "kv-cache", "static": True}], ["calibration.data=none"])


def test_a_target_is_met_in_one_pass():
    with pytest.raises(RecipeError, match="leave out alps's shots"):
        read(
            {
                "steps": [{"use": "alps", "sparsity": 0.5, "shots": 2}],
                "target": {"bits": 3},
                "save": {"format": "packed"},
            }
        )


def test_units_must_divide_the_layers(trained):
    with pytest.raises(RecipeError, match="unit 5x1 does not divide"):
        lissom.plan(trained, [{"use": "wanda", "sparsity": 0.5, "unit": "5x1"}])


def test_a_recipe_with_global_comparison_reads_back_the_same():
    recipe = read([{"use": "wanda", "sparsity": 0.5, "per": "global"}])
    assert [s.name for s in recipe.steps] == ["global-threshold", "wanda"]
    assert read(json.loads(json.dumps(recipe.describe()))).steps == recipe.steps


@pytest.mark.parametrize("spill", [False, True])
def test_e_sparse_sees_the_histograms_of_the_real_inputs(trained, tmp_path, spill):
    """Zeros of the first layer, from its inputs counted by numpy."""
    steps = [{"use": "e-sparse", "pattern": "2:4", "bins": 20, "alpha": 0.002}]
    lissom.compress(trained, tmp_path / "out", steps, overrides=SMALL, spill=spill)
    model = Model(open_model(trained))
    ids = load_calibration(model.checkpoint.tokenizer(), read(steps, SMALL).calibration, 512).ids
    block = model.load_block(0)
    with torch.no_grad():
        x = block.start(model.embed(ids)).input().flatten(0, -2).double()
    entropy = torch.tensor([_entropy(np.histogram(c, 20)[0] / len(c)) for c in x.T.numpy()])
    name = model.linears(0)[0].name
    score = block.weight(name).double().abs() * (entropy + 0.002 * (2048 * x.square().mean(0)).sqrt())
    keep = score.reshape(-1, 4) >= score.reshape(-1, 4).sort(1, descending=True).values[:, 1:2]
    got = (weights(tmp_path / "out")[name] != 0).reshape(-1, 4)
    assert float((keep == got).double().mean()) > 0.995  # a value on the edge of a bin may fall to either side


def _entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
