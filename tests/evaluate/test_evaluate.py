"""The numbers of `evaluate` against transformers and arithmetic by hand."""

import math

import pytest
import torch

import lissom
from lissom.core import CalibrationError, CheckpointError
from lissom.evaluate import load_text, samples, tokenize, windows


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "out"
    lissom.compress(trained, out, "sparsegpt", overrides=["samples=4", "length=32", "sparsity=0.5"])
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    from tiny import corpus

    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(corpus()[-20_000:], encoding="utf-8")
    return path


@torch.no_grad()
def by_hand(path, text, length, count):
    """Log probabilities (windows, length − 1, vocabulary) and ids from transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)
    rows = torch.stack([ids[i * length : (i + 1) * length] for i in range(count)])
    return torch.log_softmax(torch.cat([model(row[None]).logits for row in rows])[:, :-1], -1), rows, tokenizer


def test_perplexity_kl_and_agreement_are_those_of_transformers(trained, pruned, text):
    found = lissom.evaluate(pruned, str(text), 48, 5, against=trained)
    q, ids, tokenizer = by_hand(pruned, text, 48, 5)
    p, _, _ = by_hand(trained, text, 48, 5)
    nll = -q.gather(-1, ids[:, 1:, None])
    dense = -p.gather(-1, ids[:, 1:, None])
    assert found["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-3)
    assert found["dense_perplexity"] == pytest.approx(float(dense.mean().exp()), rel=1e-3)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-9)
    assert found["tokens"] == 5 * 47 == nll.numel() and found["windows"] == 5 and found["length"] == 48
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    assert found["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / size, rel=1e-3)
    assert found["perplexity"] > found["dense_perplexity"] and found["kl"] > 0


def test_bytes_bits_and_zeros_are_those_of_the_files(pruned, text):
    from safetensors.torch import load_file

    found = lissom.evaluate(pruned, str(text), 48, 1)
    tensors = {k: v for f in pruned.glob("*.safetensors") for k, v in load_file(f).items()}
    size = sum(f.stat().st_size for f in pruned.glob("*.safetensors"))
    linear = [v for k, v in tensors.items() if "_proj" in k]
    zeros = sum(int((v == 0).sum()) for v in linear)
    assert found["bytes"] == size
    assert found["parameters"] == sum(v.numel() for v in tensors.values())
    assert found["bits_per_weight"] == pytest.approx(8 * size / found["parameters"])
    assert found["sparsity"] == pytest.approx(zeros / sum(v.numel() for v in linear))


def test_a_model_against_itself(trained, text):
    found = lissom.evaluate(trained, str(text), 48, 2, against=trained)
    assert found["kl"] == pytest.approx(0, abs=1e-9) and found["top1_agreement"] == 1
    assert found["perplexity"] == found["dense_perplexity"]
    assert found["sparsity"] < 0.01


def test_all_windows_and_too_many_windows(trained, text):
    tokens = len(tokenize(lissom.open_model(trained).tokenizer(), text.read_text()))
    assert lissom.evaluate(trained, str(text), 100, None)["windows"] == tokens // 100
    assert lissom.evaluate(trained, str(text), 1000, 10**6)["windows"] == tokens // 1000


def test_the_function_and_the_room_have_one_name():
    """Python binds `lissom.evaluate` to the package once it is imported; the call must work before and after."""
    import importlib
    import types

    room = importlib.import_module("lissom.evaluate")
    assert isinstance(room, types.ModuleType) and callable(room) and callable(lissom.evaluate)
    assert room.__call__ is room.evaluate


def test_windows_do_not_overlap_and_samples_repeat():
    ids = torch.arange(100)
    assert windows(ids, None, 30).tolist() == [list(range(0, 30)), list(range(30, 60)), list(range(60, 90))]
    assert windows(ids, 2, 30).shape == (2, 30)
    a, b, c = samples(ids, 5, 10, 0), samples(ids, 5, 10, 0), samples(ids, 5, 10, 1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:, 1:] - a[:, :-1] == 1).all()
    assert samples(ids[:11], 3, 10, 0).shape == (3, 10)
    for call in (lambda: windows(ids, None, 101), lambda: samples(ids, 1, 100, 0)):
        with pytest.raises(CalibrationError, match="100 tokens"):
            call()


def test_builtin_text_is_there_on_every_machine():
    train, held_out = load_text("builtin"), load_text("builtin-heldout")
    assert len(train) > 250_000 and len(held_out) > 30_000
    assert held_out[:500] not in train


def test_other_vocabularies_and_models_without_a_head_are_refused(trained, random_checkpoint, text):
    with pytest.raises(CalibrationError, match="vocabulary"):
        lissom.evaluate(trained, str(text), 16, 1, against=random_checkpoint("llama"))
    with pytest.raises(CheckpointError, match="no language-model head"):
        lissom.evaluate(random_checkpoint("bert"), str(text), 16, 1)
