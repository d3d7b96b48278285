"""One budget: prices are those of the file, curves those of the model, targets are met, and bad ones refused with the nearest."""

import itertools
import json
import math
import random

import pytest
import torch

import lissom
import tiny
from lissom.core import Both, Grid, Problem, RecipeError, Sparse, Stats, sweep
from lissom.export import LayerPlan, Layout, Packed, expected_bytes, open_model
from lissom.methods.allocate.spend import Option, hull, plan_size, reach
from lissom.models import Model
from lissom.pipeline import curves, gradients
from lissom.pipeline.curves import layer_options, mean_kl, outer_as_saved, tilted
from lissom.pipeline.data import load_calibration
from lissom.pipeline.recipe import read
from lissom.pipeline.target import parse_size

SMALL = [
    "samples=6", "length=32", "allocation_samples=4", "group_size=32", "save.format=packed",
    f"calibration.data={tiny.__file__}",
]  # fmt: skip
QUICK = "target.measure=false"


def bytes_of(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def weights_of(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


def go(source, out, *more, recipe="sparsegpt", **options):
    return lissom.compress(source, out, recipe, overrides=[*SMALL, *more], **options)


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("60MB", 6e7), (" 1.5 GiB ", 1.5 * 2**30), ("250kB", 2.5e5), (60000000, 6e7), ("6e7", 6e7), ("12 b", 12)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["60 XB", "", "-3MB", "0", "MB", "1.2.3MB", "nan", "inf", "1e999MB"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(ValueError, match="60MB"):
        parse_size(text)


# prices


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.4, 0.6, 0.75, 0.9])
def test_the_price_of_a_layer_is_what_the_codec_writes(bits, sparsity):
    torch.manual_seed(0)
    W, stats = torch.randn(192, 200), Stats.of(torch.randn(400, 200))
    problem = Problem.of(W, stats, Both(Sparse(sparsity) if sparsity else None, Grid(bits, 64)))
    solved = sweep(problem, problem.factor())
    pattern = "unstructured" if sparsity else "dense"
    tensors = Packed().encode(solved, Layout(torch.float16, pattern))
    real = sum(t.numel() * t.element_size() for t in tensors.values())
    plan = LayerPlan("l", (192, 200), pattern, bits, 64)
    assert expected_bytes(plan, int(torch.count_nonzero(solved.weight))) == pytest.approx(real, rel=4e-3)


# planning against brute force


def few_options(seed, layers=4):
    r = random.Random(seed)
    return {
        f"l{i}": [
            Option(n * ((1 - s) * b + (s > 0)), c * (4.0**-b + 0.3 * s**3) * r.uniform(0.8, 1.2), s, b)
            for s in (0.0, 0.5) for b in (2, 4, 8)
        ] for i, (n, c) in enumerate((r.choice([100, 300]), 10 ** r.uniform(-2, 1)) for _ in range(layers))
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_what_reaches_a_loss_is_the_cheapest_of_all_combinations(seed):
    options = few_options(seed)
    every = [(sum(o.cost for o in c), sum(o.loss for o in c)) for c in itertools.product(*options.values())]
    worst = sum(hull(o)[0].loss for o in options.values())
    for limit in (worst, worst / 3, worst / 30):
        chosen = reach(options, limit)
        cost, loss = sum(o.cost for o in chosen.values()), sum(o.loss for o in chosen.values())
        assert loss <= limit * (1 + 1e-9)
        assert cost == pytest.approx(min(c for c, lost in every if lost <= loss * (1 + 1e-9)))
    with pytest.raises(RecipeError, match="the best loses"):
        reach(options, min(lost for _, lost in every) * 0.99)


@pytest.mark.parametrize("seed", range(8))
def test_at_every_size_of_the_walk_the_plan_is_the_best_of_all_combinations(seed):
    options = few_options(seed, 3)
    every = [(sum(o.cost for o in c), sum(o.loss for o in c)) for c in itertools.product(*options.values())]
    worst = sum(hull(o)[0].loss for o in options.values())
    for limit in (worst, worst / 2, worst / 10, worst / 50):
        size = sum(o.cost for o in reach(options, limit).values())
        loss = sum(o.loss for o in plan_size(options, size).values())
        assert loss == pytest.approx(min(lost for c, lost in every if c <= size))


@pytest.mark.parametrize("seed", range(5))
def test_more_bytes_never_promise_more_loss(seed):
    options = few_options(seed, 8)
    low, high = (sum(f(o.cost for o in os) for os in options.values()) for f in (min, max))
    losses = [
        sum(o.loss for o in plan_size(options, low + (high - low) * k / 20, 1.0).values()) for k in range(21)
    ]  # tolerance 1: what cannot be spent is left
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses))


# curves


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """The model, its data and the options of its layers."""
    model = Model(open_model(trained))
    recipe = read("sparsegpt", [*SMALL, "target.size=90kB"])
    data = load_calibration(model.checkpoint.tokenizer(), recipe.calibration, 512, 4)
    options = layer_options(model, recipe, data, 6, tmp_path_factory.mktemp("curves"))
    return model, data, options


def test_output_power_is_the_diagonal_of_the_output_gram(trained, tmp_path):
    model = Model(open_model(trained))
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients.gather(model, ids, tmp_path, ["output_gram", gradients.OUTPUT_POWER])
    for extras in gradients.block_extras(tmp_path, 1).values():
        torch.testing.assert_close(extras[gradients.OUTPUT_POWER], extras["output_gram"].diagonal())


def test_curves_fall_with_bits_and_rise_with_zeros(measured):
    for many in measured[2].values():
        dense = {o.bits: o.loss for o in many if not o.sparsity}
        assert dense[2] > dense[3] > dense[4] > dense[8]
        sparse = [o for o in many if o.bits == 6 and o.sparsity]
        assert len(sparse) > 20 and sparse[-1].loss > sparse[len(sparse) // 2].loss > sparse[0].loss
        assert sparse[-1].cost < sparse[len(sparse) // 2].cost < sparse[0].cost


def test_the_curve_of_a_layer_is_near_the_kl_that_it_really_causes(measured):
    """Round single layers of the dense model to 2 bits, run it, and compare; the second order is good to a factor of 2."""
    model, data, options = measured
    ids, ratios = data.held_out, []

    def final(name=None):
        h = model.embed(ids)
        for i in range(model.blocks):
            block = model.load_block(i)
            if name in {la.name for la in block.linears}:
                block.set_weight(name, Grid(2, 32).project(block.weight(name)))
            h = block.forward(h)
        return h

    dense, outer = final(), model.load_outer()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.v_proj"):
        rounded = mean_kl(model, dense, final(name), outer)
        predicted = next(o.loss for o in options[name] if o.bits == 2 and not o.sparsity)
        ratios.append(predicted / rounded)  # the curve is of a sweep, which loses less than rounding
    assert all(0.1 < r < 2 for r in ratios), ratios


def test_kl_is_zero_for_the_dense_model_and_tilt_spares_the_first_block(measured):
    model, data, options = measured
    h = model.embed(data.held_out)
    assert mean_kl(model, h, h, model.load_outer()) == pytest.approx(0, abs=1e-6)
    first, last = "model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"
    less = tilted({n: options[n] for n in (first, last)}, {first: 0.0, last: 1.0}, 1.0)
    assert less[first] == options[first]
    assert less[last][0].loss == pytest.approx(options[last][0].loss / math.e)


def test_outer_tensors_are_what_the_file_gives(trained, tmp_path):
    go(trained, tmp_path / "out", "target.size=100kB", QUICK)
    made = Model(open_model(tmp_path / "out"))
    bits = json.loads((tmp_path / "out" / "manifest.json").read_text())["allocation"]["sparsegpt"]["embedding_bits"]
    save = read("sparsegpt", ["save.format=packed", f"save.embedding_bits={bits}"]).save
    outer = outer_as_saved(Model(open_model(trained)), save, torch.float32)
    for name, value in made.load_outer().items():
        assert torch.equal(value, outer[name])


# runs


@pytest.fixture(scope="module")
def eighty(trained, tmp_path_factory):
    """A run to 80 kB, its manifest, and what it said."""
    out, said = tmp_path_factory.mktemp("eighty") / "out", []
    return out, go(trained, out, "target.size=80kB", note=said.append), said


def test_the_size_on_disk_is_met_and_the_loss_was_stated(eighty):
    out, made, said = eighty
    assert bytes_of(out) == made["bytes"] == pytest.approx(8e4, rel=0.01)
    record = made["allocation"]["sparsegpt"]
    assert record["expected_bytes"] == pytest.approx(made["bytes"], rel=0.01)
    assert any(text.startswith("expected: ") and "KL" in text and "measured in a trial" in text for text in said)
    assert record["measured"] and record["expected_kl"] == min(t["kl"] for t in record["trials"])
    assert [t["tilt"] for t in record["trials"]] == [0.0, 1.0]
    for row in made["layers"]:
        chosen = record["layers"][row["name"]]
        assert row["bits"] == chosen["bits"] and row["sparsity"] >= chosen["sparsity"] - 0.01


@pytest.mark.parametrize(
    ("goal", "size", "recipe"), [("target.bits=5", 5 * 180800 / 8, "gptq"), ("target.size=72kB", 72e3, "alps")]
)
def test_other_solvers_and_bits_meet_their_size_too(trained, tmp_path, goal, size, recipe):
    made = go(trained, tmp_path / "out", goal, "target.tilts=[0]", recipe=recipe)
    assert bytes_of(tmp_path / "out") == pytest.approx(size, rel=0.01)
    assert made["sparsity"] > 0.3 or recipe == "gptq"


def test_the_budget_beats_the_uniform_recipe_of_equal_size(trained, tmp_path):
    uniform = go(trained, tmp_path / "uniform", "bits=3", "embedding_bits=4", recipe="gptq")
    made = go(trained, tmp_path / "out", f"target.size={uniform['bytes']}", "target.tilts=[0]")
    assert made["bytes"] <= uniform["bytes"] * 1.01
    judged = [lissom.evaluate(tmp_path / n, tiny.__file__, 64, 16, against=trained)["kl"] for n in ("out", "uniform")]
    assert judged[0] < judged[1]


def test_a_loss_is_met_by_a_trial_and_a_looser_one_is_smaller(trained):
    tight, loose = (
        lissom.plan(trained, "sparsegpt", overrides=[*SMALL, "target.tilts=[0]", f"target.max_kl={limit}"]).target
        for limit in (2e-3, 2e-2)
    )
    assert tight and loose and tight["expected_kl"] <= 2e-3 and 0.5e-2 < loose["expected_kl"] <= 2e-2
    assert loose["expected_bytes"] < tight["expected_bytes"]


def test_plan_shows_the_same_choice_as_the_run_and_writes_nothing(trained, eighty, tmp_path):
    made = lissom.plan(trained, "sparsegpt", overrides=[*SMALL, "target.size=80kB"], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert made.target == eighty[1]["allocation"]["sparsegpt"]
    assert {r["name"]: r["bits"] for r in made.layers} == {r["name"]: r["bits"] for r in eighty[1]["layers"]}
    assert made.estimates["size_bytes"] == pytest.approx(8e4, rel=0.01)
    assert read(made.recipe.describe()) == made.recipe


class Killed(BaseException):
    """Nothing may catch this."""


def test_a_killed_run_goes_on_to_the_same_bytes(trained, eighty, tmp_path, monkeypatch):
    measure, seen = curves._curves, []

    def stop(*at):
        def tick(label, done, total):
            seen.append(label)
            if (label, done) == at:
                raise Killed

        return tick

    swept = []
    monkeypatch.setattr(curves, "_curves", lambda layers, *rest: swept.extend(layers) or measure(layers, *rest))
    for moment, blocks in ((("curves", 2), {0, 1}), (("trial 2", 3), {2, 3}), (("compress", 2), set())):
        seen = []
        swept.clear()
        with pytest.raises(Killed):
            go(trained, tmp_path / "out", "target.size=80kB", tick=stop(*moment))
        assert {la.block for la in swept} == blocks
    assert seen.count("trial 1") == 0 < seen.count("trial 2")  # the first one had been finished
    seen.clear()
    go(trained, tmp_path / "out", "target.size=80kB", tick=lambda label, *_: seen.append(label))
    assert "curves" not in seen and weights_of(tmp_path / "out") == weights_of(eighty[0])
    assert not (tmp_path / "out" / "curves").exists()


def test_one_step_for_zeros_and_another_for_codes(trained, tmp_path):
    """ALPS prunes, coordinate descent rounds; each gets its half of the choice, and the size on disk is met."""
    made = go(trained, tmp_path / "out", "target.size=70kB", "target.tilts=[0]", recipe="budget")
    assert bytes_of(tmp_path / "out") == pytest.approx(7e4, rel=0.01)
    record = made["allocation"]["gptq-descent"]
    assert any(v["sparsity"] > 0.3 for v in record["layers"].values())
    assert len({v["bits"] for n, v in record["layers"].items() if n != "embedding"}) > 1
    for row in made["layers"]:
        chosen = record["layers"][row["name"]]
        assert row["bits"] == chosen["bits"] and row["sparsity"] >= chosen["sparsity"] - 0.01


def test_curves_take_the_ratio_of_the_recipes_own_solver(trained, tmp_path, measured):
    """Rounding to nearest loses more than the sweep at every choice of bits, so every curve must lie higher."""
    model, data, swept = measured
    own = layer_options(model, read("rtn", [*SMALL, "target.size=90kB"]), data, 6, tmp_path)
    higher = [
        math.log(a.loss / b.loss) for name in own for a in own[name] for b in swept[name]
        if (a.bits, a.sparsity) == (b.bits, b.sparsity) and a.bits < 5
    ]  # fmt: skip
    assert len(higher) == 28 * 3 and sum(higher) / len(higher) > 0.1


# refusals


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("sparsegpt", ["target.size=60 XB"], "60MB"),
        ("sparsegpt", ["target.size=60MB", "target.bits=2"], "one of size, bits and max_kl"),
        ("sparsegpt", ["target.size=60MB", "bits=4"], "drop one of the two"),
        ("sparsegpt", ["target.size=60MB", "sparsegpt.sparsity=0.5"], "the target chooses sparsity"),
        ("sparsegpt", ["target.size=60MB", "embedding_bits=8"], "the target chooses embedding_bits"),
        ("sparsegpt", ["target.bits=-2"], "positive"),
        ("sparsegpt", ["target.max_kl=0"], "positive"),
        ("sparsegpt", ["target.max_kl=1", "target.measure=false"], "measured"),
        ("sparsegpt", ["target.size=60MB", "target.tilts=[]"], "tilts"),
        ("sparsegpt", ["target.sise=60MB"], "did you mean 'size'"),
        ("sparsegpt", ["target.size=60MB", "save.format=dense"], "format packed"),
        ("hqq", ["target.size=60MB", "save.format=packed"], "no integer codes"),
        ([{"use": "gptq", "bits": 4}, {"use": "rtn", "bits": 4}], ["target.size=60MB"], "exactly one"),
        (
            [{"use": "wanda", "sparsity": 0.5, "only": ["down"]}, {"use": "rtn", "bits": 4}],
            ["target.size=60MB"],
            "the same layers",
        ),
        ("flap-healed", ["target.size=60MB"], "units"),
    ],
)
def test_targets_that_make_no_sense_are_refused_without_a_model(recipe, overrides, words):
    overrides = overrides if any("format" in o for o in overrides) else [*overrides, "save.format=packed"]
    with pytest.raises(RecipeError, match=words):
        read(recipe, overrides)


@pytest.mark.parametrize(
    ("goal", "side"), [("size=9kB", "smallest"), ("size=9GB", "largest"), ("bits=0.3", "smallest")]
)
def test_sizes_out_of_reach_name_the_nearest_which_can_be_met(trained, goal, side):
    with pytest.raises(RecipeError, match="cannot be met") as refused:
        lissom.plan(trained, "sparsegpt", overrides=[*SMALL, f"target.{goal}"])
    nearest = str(refused.value).split("--target-size ")[1].split(" ")[0]
    made = lissom.plan(trained, "sparsegpt", overrides=[*SMALL, f"target.size={nearest}", QUICK])
    assert made.estimates["size_bytes"] == pytest.approx(parse_size(nearest), rel=0.012)


def test_a_loss_out_of_reach_names_the_nearest(trained):
    with pytest.raises(RecipeError, match="--max-kl"):
        lissom.plan(trained, "sparsegpt", overrides=[*SMALL, "target.tilts=[0]", "target.max_kl=1e-9"])
