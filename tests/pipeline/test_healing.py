"""The `heal` step: quality comes back, zeros and grids stay, a killed training goes on to the same bytes."""

import json
import math

import pytest
import torch

from lissom.core import CalibrationError, RecipeError
from lissom.evaluate import evaluate
from lissom.export import open_model
from lissom.methods.heal import Heal
from lissom.pipeline import compress, plan
from lissom.pipeline.recipe import read
from lissom.train import hardware

SMALL = ["calibration.samples=12", "calibration.length=48"]
HEAL = {
    "use": "heal", "steps": 24, "batch": 8, "length": 32, "learning_rate": 2e-3, "evaluate_every": 4, "held_out": 4,
}  # fmt: skip
STEPS = [{"use": "sparsegpt", "sparsity": 0.7}, HEAL]


@pytest.fixture(scope="module")
def healed(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "out"
    return out, compress(trained, out, STEPS, overrides=SMALL)


def test_it_wins_back_perplexity_and_keeps_every_zero(trained, healed, tmp_path):
    out, manifest = healed
    plain = compress(trained, tmp_path / "plain", STEPS[:1], overrides=SMALL)
    dense, pruned, better = (
        math.log(evaluate(p, length=64, count=60)["perplexity"]) for p in (trained, tmp_path / "plain", out)
    )
    assert better - dense < 0.8 * (pruned - dense)
    for a, b in zip(plain["layers"], manifest["layers"], strict=True):
        zeros = [open_model(p).tensor(f"{a['name']}.weight") == 0 for p in (tmp_path / "plain", out)]
        assert bool((zeros[1] >= zeros[0]).all()) and a["error"] == b["error"]
    history = manifest["healing"]["heal"]
    assert history[-1]["held_out"] < history[0]["held_out"] and history[-1]["step"] == 24
    assert not (out / "training").exists()


@pytest.mark.parametrize("label, at", [("heal", 17), ("compress", 3)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(trained, healed, tmp_path, label, at):
    out, _ = healed

    def stop(what, done, total):
        if (what, done) == (label, at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(trained, tmp_path / "again", STEPS, overrides=SMALL, tick=stop)
    compress(trained, tmp_path / "again", STEPS, overrides=SMALL)
    for file in sorted(out.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("rank", [0, 4])
def test_joint_sparse_and_quantized_layers_stay_on_their_grid(trained, tmp_path, rank):
    steps = [{"use": "sparsegpt", "pattern": "4:16", "bits": 4, "group_size": 32}]
    more = [*SMALL, "format=packed"]
    plain = compress(trained, tmp_path / "plain", steps, overrides=more)
    made = compress(trained, tmp_path / "out", [*steps, {**HEAL, "rank": rank}], overrides=more)
    assert made["bytes"] == pytest.approx(plain["bytes"], rel=0.01)
    grids = [_grids(p) for p in (tmp_path / "plain", tmp_path / "out")]
    assert grids[0] == grids[1] and len(grids[0]) == len(plain["layers"])
    assert made["healing"]["heal"][-1]["held_out"] < made["healing"]["heal"][0]["held_out"]


def _grids(path):
    """Scales of every layer, as bytes."""
    from safetensors import safe_open

    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118
                if "scale" in name and "layers" in name:
                    out[name] = held.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()
    return out


def test_a_text_that_is_too_short_says_what_is_needed(trained, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("just a few words")
    with pytest.raises(CalibrationError, match=r"heal: the text has \d+ tokens, 4 held-out windows"):
        compress(trained, tmp_path / "out", [STEPS[0], {**HEAL, "data": str(text)}], overrides=SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "steps, words",
    [
        ([HEAL], "works on solved layers.*or name the teacher"),
        ([STEPS[0], HEAL, {"use": "reconstruct"}], "must be the last step"),
    ],
)
def test_a_training_step_in_the_wrong_place_is_refused(steps, words):
    with pytest.raises(RecipeError, match=words):
        read(steps)


def test_a_format_that_forgets_the_grid_is_refused_by_the_plan(trained):
    with pytest.raises(RecipeError, match="format dense keeps no grid"):
        plan(trained, [{"use": "gptq", "bits": 4, "group_size": 32}, HEAL])


def test_the_plan_counts_the_training(trained):
    long, short = (
        plan(trained, [STEPS[0], {**HEAL, "steps": n}], overrides=SMALL).estimates["seconds"] for n in (100_000, 1)
    )
    assert long > 10 * short
    assert json.dumps(read(STEPS).describe())


def test_a_cached_teacher_an_average_and_recomputing_heal_too(trained, tmp_path):
    step = {**HEAL, "steps": 8, "cache": 128, "ema": 0.5, "recompute": True, "patience": 9, "text": 0.1}
    made = compress(trained, tmp_path / "out", [STEPS[0], step], overrides=SMALL)
    history = made["healing"]["heal"]
    assert history[-1]["held_out"] < history[0]["held_out"] and not (tmp_path / "out" / "training").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        ({"cache": 8, "kind": "reverse"}, "needs logits > 0, kind forward"),
        ({"cache": 8, "minutes": 1.0}, "no minutes"),
        ({"cache": 8, "relations": 1.0}, "attention and relations 0"),
        ({"layers": "first"}, "must be one of uniform, last"),
        ({"rewind": 1.0}, "rewind must be"),
        ({"gradual": 0.8, "ema": 0.9}, "neither patience nor ema"),
        ({"gradual": 1.0}, "gradual must be between"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"ema": 1.0}, "ema must be between"),
    ],
)
def test_settings_of_healing_that_cannot_be(more, words):
    with pytest.raises(RecipeError, match=words):
        read([STEPS[0], {**HEAL, **more}])


def test_a_teacher_that_does_not_fit_is_refused_by_the_plan(trained, tmp_path):
    from tiny import tiny_model

    tiny_model("llama", tmp_path / "other")
    with pytest.raises(RecipeError, match=r"heal: the teacher .*other has a vocabulary of 320, the student of 512"):
        plan(trained, [STEPS[0], {**HEAL, "teacher": str(tmp_path / "other")}])
    narrow = {"use": "random", "keep_neurons": 1.0, "keep_channels": 0.5}
    with pytest.raises(RecipeError, match="have 64 channels, those of the student 32"):
        plan(trained, [narrow, {**HEAL, "hidden": 1.0}])


def test_another_teacher_is_learned_from(trained, tmp_path):
    pruned = tmp_path / "pruned"
    compress(trained, pruned, STEPS[:1], overrides=SMALL)
    made = compress(
        pruned, tmp_path / "out", [{"use": "magnitude", "sparsity": 0.75}, {**HEAL, "steps": 8, "teacher": str(trained)}],
        overrides=SMALL,
    )  # fmt: skip
    assert made["healing"]["heal"][-1]["held_out"] < made["healing"]["heal"][0]["held_out"]


def test_a_narrower_student_heals_and_a_cached_teacher_needs_disk(trained, tmp_path):
    steps = [{"use": "random", "keep_neurons": 1.0, "keep_channels": 0.5}, {**HEAL, "steps": 6}]
    made = compress(trained, tmp_path / "out", steps, overrides=SMALL)
    assert made["healing"]["heal"][-1]["held_out"] < made["healing"]["heal"][0]["held_out"]
    disk = [plan(trained, [steps[0], {**steps[1], "cache": k}]).estimates["disk_bytes"] for k in (0, 10)]
    assert disk[1] - disk[0] == 6 * 6 * 8 * 32 * 10


def test_a_model_that_was_compressed_before_heals_alone_against_a_named_teacher(trained, tmp_path):
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    compress(trained, pruned, STEPS[:1], overrides=SMALL)
    compress(trained, small, [{"use": "random", "keep_neurons": 0.5}], overrides=SMALL)
    step = {**HEAL, "steps": 8, "teacher": str(trained)}
    for source in (pruned, small):
        made = compress(source, tmp_path / f"{source.name}-healed", [step], overrides=SMALL)
        history = made["healing"]["heal"]
        assert history[-1]["held_out"] < history[0]["held_out"]
        assert made["calibration_tokens"] < 12 * 48  # the training has its own text: few samples go through the blocks
    before, after = (open_model(p) for p in (pruned, tmp_path / "pruned-healed"))
    for row in made["layers"]:
        name = f"{row['name']}.weight"
        old, new = (c.tensor(name) for c in (before, after))
        assert not new[old == 0].any() and not torch.equal(old, new)


@pytest.mark.parametrize(
    "solver, save",
    [
        ({"use": "sparsegpt", "pattern": "4:16", "bits": 4, "group_size": 32}, ["format=packed", "embedding_bits=8"]),
        ({"use": "sparsegpt", "sparsity": 0.7}, ["format=packed"]),
        ({"use": "rtn", "bits": 2, "group_size": 32}, ["format=packed"]),
    ],
)
def test_a_packed_model_heals_alone_on_the_masks_and_grids_that_it_is_stored_with(trained, tmp_path, solver, save):
    source, out = tmp_path / "source", tmp_path / "out"
    before = compress(trained, source, [solver], overrides=[*SMALL, *save])
    step = {**HEAL, "steps": 8, "teacher": str(trained)}
    with pytest.raises(
        RecipeError, match=r"is stored as .*; save as .* too .format=.*, so that its masks and grids stay"
    ):
        plan(source, [step])
    made = compress(source, out, [step], overrides=[*SMALL, save[0]])
    assert made["healing"]["heal"][-1]["held_out"] < made["healing"]["heal"][0]["held_out"]
    assert made["bytes"] == pytest.approx(before["bytes"], rel=0.02)
    assert [(r["pattern"], r["bits"]) for r in made["layers"]] == [(r["pattern"], r["bits"]) for r in before["layers"]]
    assert _grids(source) == _grids(out)
    pairs = [[open_model(p).layer(row["name"]) for p in (source, out)] for row in made["layers"]]
    assert any(not torch.equal(old.weight, new.weight) for old, new in pairs)
    for old, new in pairs:
        assert (old.mask is None) == (new.mask is None) and (old.mask is None or torch.equal(old.mask, new.mask))


def test_what_forgets_masks_or_is_no_uniform_grid_is_not_trained(trained, tmp_path):
    step = {"use": "rtn", "bits": 4, "group_size": 32, "symmetric": True}
    compress(trained, tmp_path / "other", [step], overrides=[*SMALL, "format=compressed-tensors"])
    with pytest.raises(RecipeError, match="stored as compressed-tensors, whose masks and grids would be lost"):
        plan(tmp_path / "other", [{**HEAL, "teacher": str(trained)}], overrides=["format=compressed-tensors"])
    compress(trained, tmp_path / "packed", [{**step, "symmetric": False}], overrides=[*SMALL, "format=packed"])
    turned = [{"use": "quarot"}, {**HEAL, "teacher": str(trained)}]  # writes other weights
    with pytest.raises(RecipeError, match="stored as packed, whose masks and grids would be lost"):
        plan(tmp_path / "packed", turned, overrides=["format=packed"])
    step = {"use": "codebook", "bits": 3, "group_size": 0, "table": "kmeans"}
    compress(trained, tmp_path / "source", [step], overrides=[*SMALL, "format=packed"])
    with pytest.raises(RecipeError, match="whose masks and grids would be lost"):
        plan(tmp_path / "source", [{**HEAL, "teacher": str(trained)}], overrides=["format=packed"])


def test_inner_states_are_matched_when_asked_for(trained, tmp_path):
    step = {**HEAL, "steps": 4, "logits": 0.0, "hidden": 1.0, "attention": 1.0, "relations": 1.0, "layers": "last"}
    made = compress(trained, tmp_path / "out", [STEPS[0], {**step, "rewind": 0.5}], overrides=SMALL)
    history = made["healing"]["heal"]
    assert history[-1]["held_out"] < history[0]["held_out"]


def test_masks_grow_along_the_cubic_while_the_model_heals(trained, tmp_path):
    step = {**HEAL, "steps": 12, "gradual": 0.7, "updates": 3}
    steps = [{"use": "sparsegpt", "sparsity": 0.5}, step]
    made = compress(trained, tmp_path / "out", steps, overrides=SMALL)
    assert made["sparsity"] == pytest.approx(0.7, abs=2e-3)

    def stop(what, done, total):
        if (what, done) == ("heal", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(trained, tmp_path / "again", steps, overrides=SMALL, tick=stop)
    compress(trained, tmp_path / "again", steps, overrides=SMALL)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    grid = [{"use": "gptq", "bits": 4, "group_size": 32}, {**step, "steps": 4}]
    packed = compress(
        trained, tmp_path / "packed", grid, overrides=[*SMALL, "format=packed"]
    )  # loaded back and compared
    assert packed["sparsity"] >= 0.7 - 2e-3 and {r["pattern"] for r in packed["layers"]} == {"unstructured"}


def test_a_run_on_a_gpu_trains_there_and_in_bfloat16():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert hardware(Heal(), gpu) == ("cuda", "bfloat16")
    assert hardware(Heal(device="cpu"), gpu) == ("cpu", "float32")
    assert hardware(Heal(precision="float32"), gpu) == ("cuda", "float32")
    assert hardware(Heal(), cpu) == ("cpu", "float32")
    assert hardware(Heal(device="cuda"), cpu) == ("cuda", "bfloat16")


def test_a_gpu_that_is_not_there_is_said_before_anything_is_pruned(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="no CUDA device"):
        compress(trained, tmp_path / "out", [STEPS[0], HEAL | {"device": "cuda"}], overrides=SMALL)
    assert not (tmp_path / "out").exists()
