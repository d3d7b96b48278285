"""Recipes: shipped ones parse, overrides reach the right steps, all mistakes are found together."""

import pytest

from lissom.core import RecipeError
from lissom.methods import METHODS
from lissom.pipeline.recipe import names, read, shipped


def test_every_shipped_recipe_parses_and_reads_back_the_same():
    assert {"aggressive", "sparse-2-4", "int4", "int8"} <= set(shipped())
    for name in shipped():
        recipe = read(name)
        assert recipe.summary
        assert read(recipe.describe()) == recipe


def test_every_method_stands_for_a_recipe():
    for name, method in METHODS.items():
        if method.kind in ("solver", "allocation"):
            assert name in names() and any(step.name == name for step in read(name).steps)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "rtn", "gptq"])
def test_recipes_carry_the_names_of_their_methods(name):
    assert read(name).steps[-1].name == name


def test_short_keys_reach_the_steps_that_spell_them():
    recipe = read("prune-then-rtn", ["bits=3", "sparsity=0.5"])
    prune, quantize = recipe.steps
    assert (prune.constraint.sparsity, prune.constraint.bits) == (0.5, 16)
    assert (quantize.constraint.bits, quantize.constraint.prunes) == (3, False)


def test_short_keys_reach_every_able_step_when_none_spells_them():
    assert read("sparsegpt", ["damping=0.05"]).steps[0].config.damping == 0.05
    assert read("aggressive", ["bits=16"]).steps[1].constraint.bits == 16
    assert read("owl", ["spread=0.05"]).steps[0].config.spread == 0.05
    assert read("sparsegpt", ["format=packed"]).save.format == "packed"


def test_rounding_to_16_bits_is_left_out():
    assert [s.name for s in read("prune-then-rtn", ["bits=16"]).steps] == ["sparsegpt"]
    assert [s.name for s in read("budget", ["bits=16"]).steps] == ["alps"]
    assert [s.name for s in read("gptq", ["bits=16"]).steps] == ["gptq"]  # what is left must be something


def test_dotted_keys_reach_one_step_or_section():
    recipe = read("prune-then-rtn", ["rtn.symmetric=true", "calibration.samples=4", "save.dtype=float16"])
    assert recipe.steps[1].constraint.symmetric and not recipe.steps[0].constraint.symmetric
    assert recipe.calibration.samples == 4 and recipe.save.dtype == "float16"


def test_yaml_reads_a_pattern_as_a_number_and_we_do_not():
    assert read("sparsegpt", ["pattern=2:4", "sparsity=null"]).steps[0].constraint.nm == (2, 4)
    assert read("sparsegpt", ["pattern=4:16", "sparsity=0.75"]).steps[0].constraint.nm == (4, 16)
    assert read("sparse-2-4").steps[0].constraint.nm == (2, 4)


def test_a_list_of_steps_is_a_recipe():
    recipe = read([{"use": "wanda", "sparsity": 0.6}])
    assert recipe.steps[0].constraint.per == "row"


@pytest.mark.parametrize(
    "steps, words",
    [
        ([{"use": "sparsegtp"}], ["sparsegtp", "did you mean 'sparsegpt'"]),
        ([{"use": "sparsegpt", "sparsty": 0.5}], ["sparsty", "did you mean 'sparsity'"]),
        ([{"use": "sparsegpt", "sparsity": 1.0}], ["[0, 1)", "1"]),
        ([{"use": "sparsegpt", "sparsity": -0.1}], ["[0, 1)"]),
        ([{"use": "sparsegpt", "pattern": "5:4"}], ["N ≤ M"]),
        ([{"use": "sparsegpt", "pattern": "2:4", "sparsity": 0.7}], ["means sparsity 0.5"]),
        ([{"use": "sparsegpt", "pattern": "n:16", "sparsity": 0.7}], ["n:16", "takes N from an allocation"]),
        ([{"use": "sparsegpt", "pattern": "n:16 by row"}], ["needs 2 ≤ M ≤ 32 and a sparsity"]),
        ([{"use": "sparsegpt", "pattern": "n:16 by rows", "sparsity": 0.7}], ["'n:16 by row', not 'n:16 by rows'"]),
        (
            [{"use": "wanda", "pattern": "n:16 by row", "sparsity": 0.7}],
            ["chooses how much each row keeps", "leave out per"],
        ),
        ([{"use": "owl"}, {"use": "sparsegpt", "pattern": "2:4"}], ["leaves owl nothing to share", "n:4"]),
        ([{"use": "owl"}, {"use": "flap"}], ["owl before it shares the budget", "directly before that"]),
        ([{"use": "rtn", "bits": 9}], ["bits", "9"]),
        ([{"use": "rtn", "bits": "four"}], ["bits", "whole number"]),
        ([{"use": "rtn", "sparsity": 0.5, "bits": 4}], ["does not prune"]),
        ([{"use": "gptq", "bits": 4}, {"use": "sparsegpt", "sparsity": 0.5}], ["pruning after gptq"]),
        ([{"use": "sparsegpt", "sparsity": 0.5}, {"use": "owl"}], ["owl is the last step"]),
        ([{"use": "sparsegpt", "ignore": "("}], ["not a regular expression"]),
        ([{"use": "sparsegpt", "pattern": "2:4", "row_fisher": 1}], ["2:4 keeps as much in each", "row_fisher"]),
        ([{"use": "wanda", "sparsity": 0.5, "row_fisher": 1}], ["per row keeps as much in each", "per=layer"]),
        ([{"use": "sparsegpt", "sparsity": 0.5, "row_fisher": -1}], ["at least 0"]),
        ([], ["no steps"]),
        (["sparsegpt"], ["use: METHOD"]),
    ],
)
def test_mistakes_say_what_is_wrong(steps, words):
    with pytest.raises(RecipeError) as caught:
        read(steps)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(RecipeError) as caught:
        read([{"use": "sparsegpt", "sparsity": 2}, {"use": "rtn", "bits": 1, "grup_size": 3}], ["nonsense=1"])
    assert len(caught.value.problems) >= 4


@pytest.mark.parametrize("text", ["agressive", "sparsgpt"])
def test_unknown_recipes_get_a_suggestion(text):
    with pytest.raises(RecipeError, match="did you mean"):
        read(text)


@pytest.mark.parametrize("override", ["sparsity", "=3", "bitz=4", "gptq.bits=4"])
def test_bad_overrides_are_refused(override):
    with pytest.raises(RecipeError):
        read("sparsegpt", [override])


def test_a_recipe_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read(str(path))


def test_every_allocation_has_a_summary_or_needs_none():
    for method in METHODS.values():
        if method.kind == "allocation":
            assert method.summarise or method.learn or method.needs <= {"trials"}
