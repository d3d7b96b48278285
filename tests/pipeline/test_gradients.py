"""Gradients by block against transformers' backward pass of the whole model."""

import pytest
import torch

from lissom.core import RecipeError
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress, plan, read
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.gradients import OUTPUT_POWER, TOKEN_WEIGHT, block_extras, gather
from lissom.pipeline.planning import make_plan
from lissom.pipeline.stream import solve_stage, stream_block
from lissom.pipeline.trials import chain_of
from tiny import tiny_model


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_streamed_gradients_equal_the_whole_models(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path / "model")
    model = Model(open_model(tmp_path / "model"))
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    wanted = ["gradient", "gradient_l1", "fisher", "samples", "output_gram", TOKEN_WEIGHT]
    gather(model, ids, tmp_path, wanted, exponent=0.5)
    modules, samples, outputs = dict(theirs.named_modules()), {}, {}
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear):
            module.register_full_backward_hook(
                lambda m, i, o, n=name: outputs.setdefault(n, []).append(o[0].flatten(0, -2))
            )
    for row in ids:
        theirs.zero_grad()
        theirs(input_ids=row[None], labels=row[None]).loss.backward()
        for name, module in modules.items():
            if isinstance(module, torch.nn.Linear):
                samples.setdefault(name, []).append(module.weight.grad.clone())
    seen = 0
    for i in range(model.blocks):
        for name, extras in block_extras(tmp_path, i).items():
            g = torch.stack(samples[name])
            o = torch.cat(outputs[name])
            assert torch.allclose(extras["samples"], g, atol=1e-5, rtol=1e-3)
            assert torch.allclose(extras["gradient"], g.square().sum(0).sqrt(), atol=1e-5, rtol=1e-3)
            assert torch.allclose(extras["gradient_l1"], g.abs().sum(0), atol=1e-5, rtol=1e-3)
            assert torch.allclose(extras["fisher"], g.square().mean(0), atol=1e-6, rtol=1e-3)
            assert torch.allclose(extras["output_gram"], o.T @ o / len(o), atol=1e-6, rtol=1e-3)
            norms = o.norm(dim=1)  # (g · g)^½
            assert torch.allclose(extras[TOKEN_WEIGHT], norms / norms.mean(), atol=1e-5, rtol=1e-3)
            seen += 1
    assert seen == sum(len(model.linears(i)) for i in range(model.blocks))
    assert not list(tmp_path.glob("inputs-*"))


@pytest.mark.parametrize("method", ["gblm", "obd", "obs", "llm-surgeon"])
def test_methods_that_need_gradients_run_from_a_recipe(method, tmp_path):
    tiny_model("llama", tmp_path / "model")
    overrides = ["calibration.samples=4", "calibration.length=16"]
    made = compress(tmp_path / "model", tmp_path / "out", [{"use": method, "sparsity": 0.5}], overrides=overrides)
    assert made["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert not list((tmp_path / "out").glob("gradients-*"))


def test_rounding_for_the_loss_through_a_whole_run(trained, tmp_path):
    """Other codes than GPTQ's; GPTQ's with the output Gram matrices as white as can be."""
    overrides = ["calibration.samples=8", "calibration.length=48", "format=packed"]
    step, weights = {"use": "yaqa", "bits": 2, "group_size": 16, "sweeps": 1}, {}
    for name, damping in (("yaqa", 1.0), ("white", 1e9)):
        compress(trained, tmp_path / name, [{**step, "damping_out": damping}], overrides=overrides)
        weights[name] = Model(open_model(tmp_path / name)).load_block(1).weight("model.layers.1.mlp.up_proj")
    gptq = {"use": "gptq", "bits": 2, "group_size": 16, "act_order": True}
    compress(trained, tmp_path / "gptq", [gptq], overrides=overrides)
    theirs = Model(open_model(tmp_path / "gptq")).load_block(1).weight("model.layers.1.mlp.up_proj")
    assert (weights["white"] == theirs).double().mean() > 0.99 and not torch.equal(weights["yaqa"], theirs)


def test_the_plan_counts_what_waits_on_disk(trained, tmp_path):
    model, overrides = Model(open_model(trained)), ["calibration.samples=4", "calibration.length=16"]
    sizes = {}
    for name in ("gptq", "yaqa"):
        sizes[name] = make_plan(model, read([{"use": name, "bits": 4, "group_size": 16}], overrides)).estimates
    gather(model, torch.zeros(2, 8, dtype=torch.long), tmp_path, ["output_blocks"])
    waiting = sum(
        t.numel() * 4 for i in range(model.blocks) for e in block_extras(tmp_path, i).values() for t in e.values()
    )
    assert sizes["yaqa"]["disk_bytes"] - sizes["gptq"]["disk_bytes"] == waiting > 0
    assert sizes["yaqa"]["memory_bytes"] > sizes["gptq"]["memory_bytes"]


def test_outputs_of_wide_layers_are_gathered_in_blocks(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lissom.pipeline.gradients.BLOCK", 24)
    model = Model(open_model(trained))
    gather(model, torch.arange(32).reshape(2, 16), tmp_path, ["output_gram", "output_blocks"])
    for layer in model.linears(0):
        extras = block_extras(tmp_path, 0)[layer.name]
        assert extras["output_blocks"].shape == (layer.rows, min(24, layer.rows)) and layer.rows > 24
        for at in range(0, layer.rows, 24):
            whole = extras["output_gram"][at : at + 24, at : at + 24]
            torch.testing.assert_close(extras["output_blocks"][at : at + 24, : len(whole)], whole)


def test_rounding_for_the_loss_where_there_is_none_takes_outputs_alike(random_checkpoint, tmp_path):
    overrides = ["calibration.samples=4", "calibration.length=16"]
    steps = [{"use": "yaqa", "bits": 4, "group_size": 16}]
    compress(random_checkpoint("bert"), tmp_path / "out", steps, overrides=overrides)
    plan = make_plan(Model(open_model(random_checkpoint("bert"))), read(steps, overrides))
    assert any("no head" in w and "alike" in w for w in plan.warnings) and not list(
        (tmp_path / "out").glob("gradients-*")
    )


def test_rows_are_compared_by_what_the_loss_makes_of_their_outputs(trained, tmp_path):
    """The weighted error – the second order of the KL – falls, the plain one rises, and every layer keeps its budget."""
    overrides = ["calibration.samples=8", "calibration.length=48", "sparsity=0.7"]
    model = Model(open_model(trained))
    ids = load_calibration(model.checkpoint.tokenizer(), read("sparsegpt", overrides).calibration, 512).ids
    gather(model, ids, tmp_path, [OUTPUT_POWER])
    totals, zeros = {}, {}
    for exponent in (0, 1):
        chain = chain_of(make_plan(model, read("sparsegpt", [*overrides, f"row_fisher={exponent}"])), {})
        plain = weighted = 0.0
        for i in range(model.blocks):
            block, extras = model.load_block(i), block_extras(tmp_path, i)

            def solve(stage, stats, block=block, extras=extras, exponent=exponent, chain=chain):
                nonlocal plain, weighted
                for r in solve_stage(stage, {la.name: block.weight(la.name) for la in stage}, stats, chain, extras):
                    power = extras[r.layer.name][OUTPUT_POWER]
                    plain += float(r.solved.error.sum())
                    weighted += float(r.solved.error @ (power / power.mean()))
                    zeros[exponent, r.layer.name] = int((r.solved.weight == 0).sum())

            stream_block(block, embed(model, ids), solve)  # every block on the embeddings: nothing else may differ
        totals[exponent] = plain, weighted
    assert totals[1][1] < 0.97 * totals[0][1] and totals[1][0] > totals[0][0]
    assert all(zeros[0, n] == zeros[1, n] for _, n in zeros)


def test_row_fisher_through_a_whole_run(trained, tmp_path):
    overrides = ["calibration.samples=8", "calibration.length=48", "sparsity=0.7"]
    masks = {}
    for exponent in (0.0, 0.5):
        made = compress(
            trained, tmp_path / str(exponent), "sparsegpt", overrides=[*overrides, f"row_fisher={exponent}"]
        )
        assert made["sparsity"] == pytest.approx(0.7, abs=0.01)
        masks[exponent] = (
            Model(open_model(tmp_path / str(exponent))).load_block(1).weight("model.layers.1.mlp.up_proj") != 0
        )
    assert not torch.equal(*masks.values())
    spread = [float(m.sum(1).float().std()) for m in masks.values()]
    assert spread[1] > spread[0]


def test_a_method_that_reads_no_text_reads_it_for_its_rows(trained, tmp_path):
    overrides = ["calibration.samples=8", "calibration.length=48", "sparsity=0.5"]
    without, with_rows = (
        compress(trained, tmp_path / str(e), "magnitude", overrides=[*overrides, f"row_fisher={e}"]) for e in (0, 0.5)
    )
    assert without["calibration_tokens"] < with_rows["calibration_tokens"] == 8 * 48


def test_statistics_weigh_tokens_batch_by_batch_and_stage_by_stage(trained):
    """Against products made by hand from what each stage reads; the held-out batch behind the others is not counted."""
    model = Model(open_model(trained))
    ids = torch.randint(0, 512, (5, 16), generator=torch.Generator().manual_seed(0))
    batches = [model.embed(part) for part in ids.split(2)]
    block = model.load_block(0)
    w = {la.name: torch.rand(64, generator=torch.Generator().manual_seed(n)) for n, la in enumerate(block.linears)}
    extras = {n: {TOKEN_WEIGHT: v} for n, v in w.items()}
    found, read_by_hand = [], []

    def visit(stage, stats):
        found.append((stage, stats))

    plain = [block.start(h) for h in batches[:2]]
    for number in range(len(block.stages)):
        if number:
            for run in plain:
                run.advance()
        read_by_hand.append(torch.cat([run.input().flatten(0, -2) for run in plain]))
    stream_block(block, list(batches), visit, watch=2, extras=extras)
    for (stage, stats), X in zip(found, read_by_hand, strict=True):
        ours = sum(la.rows * w[la.name] for la in stage) / sum(la.rows for la in stage)
        torch.testing.assert_close(stats.gram, X.T @ (X * ours[:, None]), rtol=1e-4, atol=1e-4)
        assert stats.count == 64


def test_token_fisher_through_a_whole_run(trained, tmp_path):
    overrides = ["calibration.samples=8", "calibration.length=48", "sparsity=0.7"]
    weights = {}
    for exponent in (0.0, 0.5):
        out = tmp_path / str(exponent)
        compress(trained, out, "loss-clusters", overrides=[*overrides, f"token_fisher={exponent}", "bits=16"])
        weights[exponent] = Model(open_model(out)).load_block(1).weight("model.layers.1.mlp.up_proj")
    assert not torch.equal(*weights.values())
    with pytest.raises(RecipeError, match="token_fisher"):
        plan(trained, "sparsegpt", overrides=["token_fisher=0.5", "calibration.data=none"])
    with pytest.raises(RecipeError, match="token_fisher"):
        plan(trained, "sparsegpt", overrides=["token_fisher=-1"])


def test_a_model_without_a_head_has_no_loss_and_rows_count_alike(tmp_path):
    tiny_model("bert", tmp_path / "model")
    overrides = ["calibration.samples=4", "calibration.length=16", "sparsity=0.5"]
    compress(tmp_path / "model", tmp_path / "plain", "sparsegpt", overrides=overrides)
    compress(
        tmp_path / "model", tmp_path / "out", "sparsegpt", overrides=[*overrides, "row_fisher=1", "token_fisher=1"]
    )
    files = [sorted((tmp_path / n).glob("*.safetensors")) for n in ("plain", "out")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    told = plan(tmp_path / "model", "sparsegpt", overrides=[*overrides, "row_fisher=1", "token_fisher=1"]).warnings
    assert sum("no head" in w for w in told) == 2
