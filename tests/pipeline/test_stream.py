"""Oracle of the staged stream: the same weights as a loop that runs the whole transformers model again for every layer."""

import pytest
import torch

import lissom
import tiny
from lissom.core import Both, Grid, Problem, Sparse, Stats
from lissom.export import open_model
from lissom.kernels.columns import column_loop
from lissom.methods import METHODS
from lissom.models import Model
from lissom.pipeline.data import load_calibration
from lissom.pipeline.recipe import read

TEXT = f"calibration.data={tiny.__file__}"
SMALL = ["samples=6", "length=24", TEXT, "sparsity=0.6", "dtype=float32", "format=dense"]
ORDER = {
    "llama": [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}  # fmt: skip


@torch.no_grad()
def naive(source, kind, ids, method, config, constraint):
    """Solve layer after layer; the inputs of each come from a full forward of the model as it is by then."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    blocks = "model.layers" if kind == "llama" else "transformer.h"
    solved = {}
    for i in range(2):
        for local in ORDER[kind]:
            name = f"{blocks}.{i}.{local}"
            layer, seen = model.get_submodule(name), []
            hook = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2)))
            for row in ids:
                model(row[None])
            hook.remove()
            conv = type(layer).__name__ == "Conv1D"
            weight = layer.weight.T.contiguous() if conv else layer.weight.clone()
            problem = Problem.of(weight, Stats.of(torch.cat(seen), True), constraint, loop=column_loop())
            result = METHODS[method].run(problem, config).weight
            layer.weight.copy_(result.T if conv else result)
            solved[name] = result
    return solved


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "recipe, constraint",
    [("sparsegpt", Sparse(0.6, "layer")), ("wanda", Sparse(0.6, "row")), ("magnitude", Sparse(0.6, "layer"))],
)
def test_inputs_include_the_compression_of_everything_before(
    random_checkpoint, tmp_path, kind, recipe, constraint, spill
):
    if spill and recipe != "sparsegpt":
        pytest.skip("one method is enough to see that spilled states come back")
    source = random_checkpoint(kind)
    lissom.compress(source, tmp_path / "out", recipe, overrides=SMALL, spill=spill)
    checked, checkpoint = read(recipe, SMALL), open_model(source)
    ids = load_calibration(checkpoint.tokenizer(), checked.calibration, 320).ids
    expected = naive(source, kind, ids, recipe, checked.steps[-1].config, constraint)
    found = open_model(tmp_path / "out")
    names = {layer.name for i in range(2) for layer in Model(found).linears(i)}
    assert names == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(
            found.layer(name).weight, weight, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_joint_sweep_with_a_grid_too(random_checkpoint, tmp_path):
    overrides = [
        "samples=6",
        "length=24",
        TEXT,
        "sparsity=0.5",
        "bits=4",
        "group_size=16",
        "dtype=float32",
        "format=packed",
    ]
    source = random_checkpoint("llama")
    lissom.compress(source, tmp_path / "out", "sparsegpt", overrides=overrides)
    checked, checkpoint = read("sparsegpt", overrides), open_model(source)
    ids = load_calibration(checkpoint.tokenizer(), checked.calibration, 320).ids
    constraint = Both(Sparse(0.5, "layer"), Grid(4, 16))
    expected = naive(source, "llama", ids, "sparsegpt", checked.steps[-1].config, constraint)
    found = open_model(tmp_path / "out")
    for name, weight in expected.items():
        torch.testing.assert_close(found.layer(name).weight, weight, atol=1e-4, rtol=1e-4)


def test_statistics_of_the_dense_model_would_be_found_out(random_checkpoint, tmp_path):
    """The oracle above can fail: without updating the model between layers its result is another one."""
    source = random_checkpoint("llama")
    lissom.compress(source, tmp_path / "out", "sparsegpt", overrides=SMALL)
    checked, checkpoint = read("sparsegpt", SMALL), open_model(source)
    ids = load_calibration(checkpoint.tokenizer(), checked.calibration, 320).ids
    model = Model(checkpoint)
    hidden = model.load_block(0).forward(model.embed(ids))
    block = model.load_block(1)
    run = block.start(hidden)
    layer = block.stages[0][0]
    problem = Problem.of(
        block.weight(layer.name), Stats.of(run.input().flatten(0, -2), True), Sparse(0.6), loop=column_loop()
    )
    stale = METHODS["sparsegpt"].run(problem, checked.steps[-1].config).weight
    assert not torch.allclose(open_model(tmp_path / "out").layer(layer.name).weight, stale, atol=1e-3)


def test_statistics_once_per_block_are_those_of_the_block_as_it_was_loaded(random_checkpoint, tmp_path):
    source = random_checkpoint("llama")
    overrides = [*SMALL, "statistics=block"]
    lissom.compress(source, tmp_path / "out", "sparsegpt", overrides=overrides)
    checked, checkpoint = read("sparsegpt", overrides), open_model(source)
    hidden = Model(checkpoint).embed(load_calibration(checkpoint.tokenizer(), checked.calibration, 320).ids)
    found = open_model(tmp_path / "out")
    for i in range(2):
        block = Model(checkpoint).load_block(i)
        run = block.start(hidden)
        for number, stage in enumerate(block.stages):
            if number:
                run.advance()
            for layer in stage:
                problem = Problem.of(block.weight(layer.name), Stats.of(run.input().flatten(0, -2), True), Sparse(0.6))
                expected = METHODS["sparsegpt"].run(problem, checked.steps[-1].config).weight
                torch.testing.assert_close(found.layer(layer.name).weight, expected, atol=1e-4, rtol=1e-4)
        hidden = Model(found).load_block(i).forward(hidden)
