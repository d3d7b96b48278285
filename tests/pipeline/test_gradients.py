"""Gradients by block against transformers' backward pass of the whole model."""

import pytest
import torch

from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress
from lissom.pipeline.gradients import block_extras, gather
from tiny import tiny_model


@pytest.mark.parametrize("kind", ["llama-tied", "opt"])
def test_streamed_gradients_equal_the_whole_models(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path / "model")
    model = Model(open_model(tmp_path / "model"))
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    gather(model, ids, tmp_path, ["gradient", "gradient_l1", "fisher", "samples", "output_gram"])
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
