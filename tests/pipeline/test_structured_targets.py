"""Targets in parameters, bytes and latency; widths that differ by block and how the plan says it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import RecipeError
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress, plan
from lissom.pipeline.data import load_calibration
from lissom.pipeline.recipe import read
from lissom.pipeline.shapes import planned_model
from lissom.pipeline.structured_search import counts_of
from lissom.pipeline.structured_targets import LatencyTable, with_targets

SMALL = ["calibration.samples=4", "calibration.length=24"]


class _Counted(LatencyTable):
    """A machine that needs a nanosecond for a weight, so that latency is counted in weights."""

    def of(self, rows, columns):
        return self.seconds.setdefault((rows, columns), rows * columns * 1e-9)


def _sizes(model, step):
    recipe, record = with_targets(model, read([step]), table=_Counted())
    return planned_model(model, recipe), record[0], recipe.steps[0].config


@pytest.mark.parametrize("of", ["parameters", "bytes", "latency"])
@pytest.mark.parametrize("target", [0.9, 0.75])
def test_the_largest_shape_within_the_target_is_taken(trained, of, target):
    model = Model(open_model(trained))
    step = {"use": "structured-magnitude", "keep_neurons": 0.5, "target": target, "of": of}
    small, record, config = _sizes(model, step)
    assert record["planned"] <= record["target"] == pytest.approx(target * record["dense"])
    assert config.target is None and config.keep_heads == 1
    # one notch of 32 neurons more would be too large
    wider = config.keep_neurons + 32 / 128
    assert wider <= 1
    if of == "parameters":
        assert small.parameters_count == record["planned"]
        if wider < 1:
            more = planned_model(model, read([{"use": "structured-magnitude", "keep_neurons": wider}]))
            assert more.parameters_count > record["target"]


def test_absolute_targets_and_the_proportion_of_kinds(trained):
    model = Model(open_model(trained))
    step = {"use": "random", "keep_heads": 0.5, "keep_neurons": 0.5, "target": 120_000.0}
    small, record, config = _sizes(model, step)
    assert small.parameters_count <= 120_000 < record["dense"] and config.keep_heads == 0.5 and config.keep_neurons < 1
    micro = {"use": "random", "keep_neurons": 0.5, "target": 110.0, "of": "latency"}
    assert _sizes(model, micro)[1]["target"] == pytest.approx(110e-6)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"target": 0.01}, "no shape meets target 0.01 of parameters .*the smallest shape has"),
        ({"target": 0.5, "keep_neurons": 1.0}, "needs a kind of units to remove"),
        ({"target": -1.0}, "target must be positive"),
        ({"target": 0.9, "spread": 0.1}, "the same width for all blocks"),
        ({"spread": 1.5}, "spread must be at least 0"),
        ({"spread": 0.9}, "spread makes the widest block as wide as before"),
    ],
)
def test_targets_that_cannot_be_met_are_refused_by_the_plan(trained, more, words):
    with pytest.raises(RecipeError, match=words):
        plan(trained, [{"use": "structured-magnitude", **more}])


def test_a_measured_time_is_taken_once_and_grows_with_the_matrix():
    table = LatencyTable(repeats=9)
    small, large = table.of(8, 8), table.of(4000, 2000)
    assert 0 < small < large and table.of(8, 8) == small and set(table.seconds) == {(8, 8), (4000, 2000)}


def test_the_latency_table_of_a_run_is_in_the_manifest(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.pipeline.structured_targets.LatencyTable", _Counted)  # tiny matrices are all overhead
    step = {"use": "random", "keep_neurons": 0.25, "target": 0.95, "of": "latency"}
    made = compress(trained, tmp_path / "out", [step], overrides=SMALL)
    found = made["targets"][0]
    assert found["planned"] <= found["target"] and "64x64" in found["table"]
    model = Model(open_model(tmp_path / "out"))
    assert model.config.intermediate_size == round(found["keep"]["neurons"] * 128) < 128
    assert not (tmp_path / "out" / "targets.json").exists()


def test_an_unfinished_run_keeps_the_shape_that_it_measured(trained, tmp_path):
    class Other(_Counted):  # the same machine on another day: the head costs much more
        def of(self, rows, columns):
            return super().of(rows, columns) * (99 if rows == 512 else 1)

    model = Model(open_model(trained))
    recipe = read([{"use": "random", "keep_neurons": 0.25, "target": 0.9, "of": "latency"}])
    first, record = with_targets(model, recipe, tmp_path / "targets.json", _Counted())
    (tmp_path / "targets.json").write_text(json.dumps(record))
    again, same = with_targets(model, recipe, tmp_path / "targets.json", Other())
    assert again == first and same == record
    with pytest.raises(RecipeError, match="no shape meets"):
        with_targets(model, recipe, None, Other())


def test_widths_that_differ_are_saved_as_the_widest_and_the_plan_says_so(trained, tmp_path):
    step = {"use": "flap", "keep_neurons": 0.5, "spread": 0.25, "bias": False}
    notes = plan(trained, [step]).warnings
    assert any(
        "64 of 128 on average, every block saved with 96, the rest zeros (llama has one width" in n for n in notes
    )
    even = plan(trained, [{**step, "spread": 0.0}]).warnings
    assert any("the same 64 of 128 in every block" in n for n in even)
    made = compress(trained, tmp_path / "out", [step], overrides=SMALL)
    kept = {int(i): len(v) for i, v in made["structured"][0]["neurons"].items()}
    assert sum(kept.values()) == 4 * 64 and max(kept.values()) <= 96 and len(set(kept.values())) > 1
    assert "same logits" in made["verified"]["transformers"]
    model = Model(open_model(tmp_path / "out"))
    for i in range(model.blocks):
        block = model.load_block(i)
        for role, dim in (("down", 0), ("up", 1), ("gate", 1)):
            W = block.weight(next(la.name for la in block.linears if la.role == role))
            assert int((W != 0).any(dim).sum()) == kept[i] and 96 in W.shape


def test_widths_by_predictor_search_are_never_worse_than_equal_ones_where_they_were_measured(trained, tmp_path):
    step = {"use": "structured-magnitude", "keep_neurons": 0.5, "spread": 0.25, "search": 10}
    made = [compress(trained, tmp_path / name, [step], overrides=SMALL) for name in "ab"]
    found = made[0]["structured"][0]["search"]["neurons"]
    assert made[0]["structured"] == made[1]["structured"]
    assert found["best"] == min([found["uniform"], *found["sampled"], *found["rounds"][0]["measured"]])
    counts = found["counts"]
    assert sum(counts) == 4 * 64 and max(counts) <= 96 and min(counts) >= 32 and len(set(counts)) > 1
    assert [len(v) for v in made[0]["structured"][0]["neurons"].values()] == counts
    # the loss that the search saw is that of the artefact on the same samples
    model, artefact = (Model(open_model(p)) for p in (trained, tmp_path / "a"))
    recipe = read([step], SMALL)
    ids = load_calibration(model.checkpoint.tokenizer(), recipe.calibration, 512).ids[:8]
    logits = artefact.forward(ids)
    naive = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(naive) == pytest.approx(found["best"], abs=1e-4)
    with pytest.raises(RecipeError, match="needs a spread"):
        read([{"use": "flap", "search": 10}])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), mean=st.integers(2, 9), spread=st.integers(1, 4), blocks=st.integers(1, 7))
def test_whole_numbers_of_units_meet_their_mean_between_their_bounds(seed, mean, spread, blocks):
    low, high = max(1, mean - spread), min(12, mean + spread)
    shares = torch.rand(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    counts = counts_of(shares, 12, mean, low, high)
    assert sum(counts) == mean * blocks and low <= min(counts) and max(counts) <= high
    exact = [(mean - 0.0) / 12] * blocks
    assert counts_of([1 - e for e in exact], 12, mean, low, high) == [mean] * blocks


def test_a_spread_of_zero_is_the_same_bytes_as_none(trained, tmp_path):
    for name, more in {"a": {}, "b": {"spread": 0.0}}.items():
        compress(
            trained, tmp_path / name, [{"use": "structured-magnitude", "keep_neurons": 0.5, **more}], overrides=SMALL
        )
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert torch.isfinite(Model(open_model(tmp_path / "a")).load_block(0).weight("model.layers.0.mlp.up_proj")).all()
