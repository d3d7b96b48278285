"""The whole model in memory: same logits as the stream, gradients that are right, healing of a damaged student."""

import pytest
import torch

from lissom.core import CalibrationError, CheckpointError, Codes, Grid
from lissom.export import open_model
from lissom.methods.heal.legal import Legal
from lissom.models import Model
from lissom.train import (
    Batches,
    Frozen,
    Gated,
    HardConcrete,
    Latent,
    LoRA,
    Network,
    Objective,
    Training,
    cache_teacher,
    held_out_loss,
    loss_against,
    loss_against_cache,
    train,
)


@pytest.fixture(scope="module")
def ids(trained):
    tokenizer = open_model(trained).tokenizer()
    from tiny import corpus

    return torch.tensor(tokenizer(corpus()[:30_000]).input_ids)


def _network(path, **rest):
    return Network(Model(open_model(path)), **rest)


def _damaged(path, share=0.6):
    """A student whose linear layers lost their smallest weights."""
    student = _network(path)
    for block in student.blocks:
        for layer in block.linears:
            W = block.weight(layer.name)
            mask = W.abs() > W.abs().flatten().kthvalue(int(share * W.numel())).values
            student.forms[f"{layer.name}.weight"] = Latent(torch.where(mask, W, 0.0), Legal(mask, None))
    return student


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom"])
def test_a_moved_network_leaves_nothing_behind(kind, recompute, tmp_path, monkeypatch):
    """On torch's `meta` device operations with a tensor of another device fail, as they would on a GPU."""
    from tiny import tiny_model

    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: 0)  # ids have no values there

    tiny_model(kind, tmp_path)
    network = _network(tmp_path, recompute=recompute)
    first, second, third = (f"{la.name}.weight" for la in network.blocks[0].linears[-3:])
    W = network.tensor(first)
    codes = Codes.round(W, Grid(4, 8).fit_all(W), 4, 8)
    network.forms = {
        first: Latent(W.clone(), Legal(W > 0, codes)),
        second: LoRA(network.tensor(second), 2, legal=Legal(network.tensor(second) > 0, None)),
        third: Gated(Frozen(network.tensor(third)), gates := HardConcrete.start(3), torch.zeros(len(network.tensor(third))).long(), "rows"),
    }  # fmt: skip
    gates.sample(torch.Generator().manual_seed(0))
    assert network.to("meta").device.type == "meta"
    batch = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    out = network.forward(batch, hidden=True)
    assert {t.device.type for t in [out.logits, *out.hidden, *network.leaves().values()]} == {"meta"}
    out.logits.square().mean().backward()
    assert all(t.grad is not None and t.grad.device.type == "meta" for t in network.leaves().values())


def test_moving_keeps_weights_and_leaves(trained, ids):
    student = _damaged(trained)
    before = student.forward(ids[None, :20]).logits.detach()
    leaves = student.leaves()
    student.to("cpu")
    assert all(a is b for a, b in zip(leaves.values(), student.leaves().values(), strict=True))
    assert torch.equal(student.forward(ids[None, :20]).logits, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom"])
def test_logits_and_gradients_are_those_of_the_stream_and_of_transformers(kind, tmp_path):
    from tiny import tiny_model

    theirs = tiny_model(kind, tmp_path)
    batch = torch.randint(2, 300, (2, 10), generator=torch.Generator().manual_seed(0))
    network = _network(tmp_path, recompute=True)
    name = f"{network.blocks[0].linears[-1].name}.weight"
    network.forms[name] = form = Latent(network.tensor(name).clone())
    out = network.forward(batch)
    assert torch.allclose(out.logits, network.model.forward(batch), atol=1e-4)
    out.logits.square().mean().backward()
    theirs(batch).logits.square().mean().backward()
    expected = dict(theirs.named_parameters())[name].grad
    expected = expected.T if network.model.architecture.transposed else expected
    assert torch.allclose(form.value.grad, expected, atol=1e-5, rtol=1e-3)


def test_distillation_heals_a_pruned_student_and_keeps_its_zeros(trained, ids):
    teacher, student = _network(trained), _damaged(trained)
    windows = ids[-8 * 32 :].view(8, 32)
    data = Batches(ids[: -8 * 32], 32, 8)
    loss = loss_against(student, teacher, Objective(logits=1.0, hidden=0.1))
    dense = held_out_loss(teacher, windows)
    state = train(
        student.leaves(), loss, data, Training(steps=25, learning_rate=2e-3, evaluate_every=25),
        held_out=lambda: held_out_loss(student, windows),
    )  # fmt: skip
    before, after = state.history[0]["held_out"], state.history[-1]["held_out"]
    assert after - dense < 0.6 * (before - dense)
    for form in student.forms.values():
        assert not form.final()[~form.legal.mask].any()
    logits = student.forward(windows[:1]).logits
    student.settle()
    assert not student.forms and torch.allclose(student.forward(windows[:1]).logits, logits, atol=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(kind="reverse", temperature=2.0),
        Objective(kind="js"),
        Objective(logits=0, hidden=1),
        Objective(logits=0, hidden=1, distance="cosine"),
        Objective(logits=0, attention=1),
        Objective(logits=0, relations=1),
    ],
    ids=str,
)
def test_every_term_is_zero_for_the_teacher_itself_and_leads_somewhere_for_others(trained, ids, objective):
    teacher, student = _network(trained), _damaged(trained)
    batch = ids[:24].view(1, 24)
    assert abs(float(loss_against(_network(trained), teacher, objective)(batch).detach())) < 1e-5
    value = loss_against(student, teacher, objective)(batch)
    assert float(value.detach()) > 1e-5
    value.backward()
    assert any(t.grad is not None and t.grad.abs().max() > 0 for t in student.leaves().values())


def test_lora_on_every_layer_starts_at_the_base_and_trains_fewer_numbers(trained, ids):
    student = _network(trained)
    for block in student.blocks:
        for layer in block.linears:
            student.forms[f"{layer.name}.weight"] = LoRA(block.weight(layer.name), rank=2)
    batch = ids[:40].view(2, 20)
    assert torch.allclose(student.forward(batch).logits, _network(trained).forward(batch).logits, atol=1e-5)
    leaves = student.leaves()
    assert (
        sum(t.numel() for t in leaves.values()) < sum(b.numel() for f in student.forms.values() for b in [f.base]) / 4
    )


def test_bf16_products_train_fp32_leaves(trained, ids):
    student = _damaged(trained)
    loss = loss_against(student, None, Objective(text=1.0, logits=0.0))
    config = Training(steps=2, learning_rate=1e-3, precision="bfloat16")
    state = train(student.leaves(), loss, Batches(ids, 16, 2), config)
    assert state.step == 2 and {t.dtype for t in student.leaves().values()} == {torch.float32}


def test_cached_teachers_are_found_by_their_windows_and_give_nearly_the_same_loss(trained, ids, tmp_path):
    teacher, student, data = _network(trained), _damaged(trained), Batches(ids, 16, 2)
    cache_teacher(teacher, data, range(3), 511, tmp_path)
    times = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    cache_teacher(teacher, data, range(3), 511, tmp_path)
    assert times == [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    cached, live = loss_against_cache(student, tmp_path), loss_against(student, teacher, Objective())
    assert float(cached(data.at(2)).detach()) == pytest.approx(float(live(data.at(2)).detach()), rel=5e-3)
    with pytest.raises(CalibrationError, match="not in the teacher's cache"):
        cached(data.at(3))


def test_teachers_that_do_not_fit_are_refused(trained, tmp_path):
    from tiny import tiny_model

    tiny_model("llama", tmp_path / "other")
    with pytest.raises(CalibrationError, match="vocabulary of 320"):
        loss_against(_network(trained), _network(tmp_path / "other"), Objective())
    with pytest.raises(CalibrationError, match="give one"):
        loss_against(_network(trained), None, Objective())
    tiny_model("bert", tmp_path / "bert")
    with pytest.raises(CheckpointError, match="no language-model head"):
        _network(tmp_path / "bert")
    with pytest.raises(ValueError, match="one must be positive"):
        Objective(logits=0)


def test_perplexity_of_the_network_is_that_of_evaluate(trained, ids):
    from lissom.evaluate import forward, token_losses

    windows = ids[:64].view(2, 32)
    model = Model(open_model(trained))
    seen = forward(model, windows)
    theirs = torch.stack(
        [token_losses(model, h, row).mean() for h, row in zip(seen.hidden, windows, strict=True)]
    ).mean()
    assert held_out_loss(_network(trained), windows) == pytest.approx(float(theirs), rel=1e-5)
