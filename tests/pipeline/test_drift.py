"""Layers make up for what the layers before have lost: the formula, the statistics, and whole runs."""

import pytest
import torch

from lissom.core import RecipeError, Stats
from lissom.core.stats import Tally
from lissom.evaluate import evaluate
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress, read
from lissom.pipeline.data import load_calibration
from lissom.pipeline.drift import DenseRuns, made_up
from lissom.pipeline.planning import make_plan
from lissom.pipeline.stream import stream_block
from lissom.pipeline.trials import trial

SMALL = ["calibration.samples=24", "calibration.length=48", "format=packed"]
STEPS = [{"use": "gptq", "bits": 2, "group_size": 16, "act_order": True}]


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("drift") / "out"
    return out, compress(trained, out, STEPS, overrides=[*SMALL, "drift=0.5"])


@pytest.mark.parametrize("weighed", [False, True])
def test_all_of_it_is_the_least_squares_answer(weighed):
    """Against lstsq on the tokens themselves, the damping as further tokens on which both models agree."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, generator=g)
    Y = X + 0.3 * torch.randn(200, 12, generator=g) + 0.2 * X.roll(1, 1)
    W, w = torch.randn(5, 12, generator=g), torch.rand(200, generator=g) if weighed else None
    tally = Tally(12)
    for part in (slice(0, 70), slice(70, 200)):
        tally.add(X[part], None if w is None else w[part], Y[part])
    stats = tally.stats()
    ridge = (0.01 * stats.hessian.diagonal().mean() * 100).sqrt() * torch.eye(12)  # hessian = 2/200 Σ
    root = torch.ones(200, 1) if w is None else w.sqrt()[:, None]
    x, y = torch.cat([root * X, ridge]), torch.cat([root * Y, ridge])
    theirs = torch.linalg.lstsq(x, y @ W.T).solution.T
    torch.testing.assert_close(made_up({"a": W}, stats, 1.0)["a"], theirs, rtol=1e-3, atol=1e-3)
    half = made_up({"a": W}, stats, 0.5)["a"]
    torch.testing.assert_close(half, (W + theirs) / 2, rtol=1e-3, atol=1e-3)


def test_nothing_lost_or_nothing_seen_changes_nothing():
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    W = torch.randn(3, 6)
    tally = Tally(6)
    tally.add(X, None, X)
    torch.testing.assert_close(made_up({"a": W}, tally.stats(), 1.0)["a"], W, rtol=1e-5, atol=1e-5)
    assert made_up({"a": W}, Stats.of(X), 1.0)["a"] is W


@pytest.mark.parametrize("at_once", [False, True])
def test_every_stage_sees_the_dense_inputs_beside_its_own(trained, at_once):
    model = Model(open_model(trained))
    ids = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [model.embed(part) for part in ids.split(2)]
    dense = [h + 0.1 * torch.randn_like(h) for h in batches]
    expected, block = [], model.load_block(0)
    plain = [block.start(h) for h in dense]
    for number in range(len(block.stages)):
        if number:
            for run in plain:
                run.advance()
        expected.append(torch.cat([run.input().flatten(0, -2) for run in plain]))
    targets = [model.load_block(0).forward(h) for h in dense]
    block, seen = model.load_block(0), []

    def visit(stage, stats):
        seen.append(stats)
        for layer in stage:
            block.set_weight(layer.name, 0.9 * block.weight(layer.name))  # the dense run must not notice

    beside = DenseRuns(block, dense, None, 0)
    stream_block(block, list(batches), visit, at_once=at_once, dense=beside)
    own = [block_inputs(model, batches, n, 1.0 if at_once else 0.9) for n in range(len(expected))]
    for stats, X, Y in zip(seen, own, expected, strict=True):
        torch.testing.assert_close(stats.gram, X.T @ X, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats.cross, Y.T @ X, rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(beside.outputs(), targets, strict=True):
        torch.testing.assert_close(ours, theirs)


def block_inputs(model, batches, stage, scale):
    """What a stage reads once the stages before it have ``scale`` times their weights."""
    block = model.load_block(0)
    runs = [block.start(h) for h in batches]
    for before in block.stages[:stage]:
        for layer in before:
            block.set_weight(layer.name, scale * block.weight(layer.name))
        for run in runs:
            run.advance()
    return torch.cat([run.input().flatten(0, -2) for run in runs])


def test_the_model_comes_nearer_to_the_dense_one(trained, whole, tmp_path):
    compress(trained, tmp_path / "plain", STEPS, overrides=SMALL)
    with_it, without = (evaluate(p, against=trained, length=48, count=16)["kl"] for p in (whole[0], tmp_path / "plain"))
    assert with_it < 0.95 * without


def test_spilled_killed_and_resumed_the_bytes_are_the_same(trained, whole, tmp_path):
    out, manifest = whole

    def stop(label, done, total):
        if (label, done) == ("compress", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(trained, tmp_path / "again", STEPS, overrides=[*SMALL, "drift=0.5"], tick=stop, spill=True)
    again = compress(trained, tmp_path / "again", STEPS, overrides=[*SMALL, "drift=0.5"], spill=True)
    assert files(tmp_path / "again") == files(out)
    assert [r["relative_error"] for r in again["layers"]] == [r["relative_error"] for r in manifest["layers"]]


def test_a_trial_in_memory_gives_what_the_run_gives(trained, whole):
    model = Model(open_model(trained))
    recipe = read(STEPS, [*SMALL, "drift=0.5"])
    data = load_calibration(model.checkpoint.tokenizer(), recipe.calibration, 512)
    weights = {}

    def visit(result):
        weights[result.layer.name] = result.solved.weight

    trial(model, [(recipe.steps[0], None)], data, visit=visit, drift=0.5)
    made = Model(open_model(whole[0])).load_block(1)
    for layer in made.linears:
        assert torch.equal(made.weight(layer.name), weights[layer.name]), layer.name


def test_with_steps_on_whole_blocks_both_share_the_dense_stream(trained, tmp_path):
    steps = [*STEPS, {"use": "reconstruct", "epochs": 1}]
    made = compress(trained, tmp_path / "out", steps, overrides=[*SMALL, "drift=1"])
    assert all(row["healed"]["after"] <= row["healed"]["before"] for row in made["layers"])


def test_the_plan_counts_the_second_stream(trained):
    model = Model(open_model(trained))
    alone, both = (make_plan(model, read(STEPS, [*SMALL, f"drift={d}"])).estimates for d in (0, 0.5))
    assert both["memory_bytes"] > alone["memory_bytes"] and both["disk_bytes"] > alone["disk_bytes"]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["drift=1.5"], "between 0 and 1"),
        (["drift=0.5", "calibration.data=none"], "data is none"),
        (["drift=0.5", "shots=2"], "one shot"),
    ],
)
def test_drifts_that_cannot_be(settings, words):
    with pytest.raises(RecipeError, match=words):
        read([{"use": "sparsegpt", "sparsity": 0.5}], settings)
