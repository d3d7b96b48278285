"""Structured steps that train: wanted shapes, ordinary models, exact resume, dynamic batches; fewer channels."""

import pytest
import torch

from lissom.core import CalibrationError, RecipeError
from lissom.evaluate import evaluate
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress, plan
from lissom.train import Network
from tiny import corpus, tiny_model

SMALL = ["calibration.samples=4", "calibration.length=24"]
TRAIN = {
    "steps": 16,
    "batch": 4,
    "length": 24,
    "held_out": 2,
    "evaluate_every": 8,
    "learning_rate": 1e-3,
    "gate_rate": 0.3,
}
IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "step, shape",
    [
        ({"use": "l0", "keep_heads": 0.5, "keep_neurons": 0.5}, (4, 64, 2, 64)),
        ({"use": "head-gates", "keep_heads": 0.5, "logits": 1.0, "weights": "frozen"}, (4, 64, 2, 128)),
        ({"use": "sheared", "keep_blocks": 0.5, "keep_channels": 0.5}, (2, 32, 2, 96)),
        ({"use": "compresso", "keep_heads": 0.5, "prompt": "Less of me."}, (4, 64, 2, 96)),
        ({"use": "lorashear", "keep_heads": 0.5, "keep_neurons": 0.5}, (4, 64, 2, 64)),
    ],
    ids=lambda v: v["use"] if isinstance(v, dict) else "",
)
def test_the_shape_is_reached_and_transformers_loads_it(trained, tmp_path, step, shape):
    made = compress(trained, tmp_path / "out", [{**TRAIN, **step}], overrides=SMALL)
    config = Model(open_model(tmp_path / "out")).config
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert found == shape and "same logits" in made["verified"]["transformers"]
    record = made["structured"][0]
    assert record["history"][-1]["step"] == 16 and record["history"][-1]["held_out"] > 0
    if step["use"] == "lorashear":
        assert record["not_yet_zero"] == 0
    else:
        assert all(v < 0.99 for v in record["expected_open"].values())
    assert not (tmp_path / "out" / "smaller").exists()


def test_a_gpu_that_is_not_there_is_said_first(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="l0: no CUDA device"):
        compress(trained, tmp_path / "out", [{**TRAIN, "use": "l0", "device": "cuda"}], overrides=SMALL)


def test_learning_beats_chance(trained, tmp_path):
    quality = {}
    for name, more in {"random": {}, "lorashear": {**TRAIN, "steps": 40, "batch": 8, "length": 32}}.items():
        compress(trained, tmp_path / name, [{"use": name, "keep_neurons": 0.5, **more}], overrides=SMALL)
        quality[name] = evaluate(tmp_path / name, length=64, count=40)["perplexity"]
    assert quality["lorashear"] < quality["random"], quality


def test_killed_it_goes_on_to_the_same_bytes_with_its_batches_by_domain(trained, tmp_path):
    text = corpus()
    for name, part in {"a": text[:20_000], "b": "abc def " * 3000}.items():
        (tmp_path / name).write_text(part)
    domains = [str(tmp_path / n) for n in "ab"]
    step = {"use": "sheared", **TRAIN, "evaluate_every": 4, "domains": domains, "reload_every": 4}

    def stop(label, done, total):
        if (label, done) == ("sheared", 9):
            raise KeyboardInterrupt

    whole = compress(trained, tmp_path / "whole", [step], overrides=SMALL)
    with pytest.raises(KeyboardInterrupt):
        compress(trained, tmp_path / "again", [step], overrides=SMALL, tick=stop)
    again = compress(trained, tmp_path / "again", [step], overrides=SMALL)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    shares = whole["structured"][0]["shares"]
    assert sum(shares.values()) == pytest.approx(1) and shares == again["structured"][0]["shares"]
    assert shares[domains[0]] != pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3"]
)
def test_masked_channels_and_a_narrower_model_give_equal_logits(kind, tmp_path):
    tiny_model(kind, tmp_path / "dense")
    step = {"use": "random", "keep_heads": 0.5, "keep_neurons": 1.0, "keep_channels": 0.5}
    assert plan(tmp_path / "dense", [step]).layers[0]["shape"][1] == 16
    made = compress(tmp_path / "dense", tmp_path / "out", [step], overrides=SMALL)
    assert "same logits" in made["verified"]["transformers"]
    record, network = made["structured"][0], Network(Model(open_model(tmp_path / "dense")))
    gone = torch.ones(32, dtype=torch.bool)
    gone[record["channels"]] = False
    with torch.no_grad():
        for name, value in network.outer.items():
            if name == network.model.embed_name:
                value[:, gone] = 0
        for block in network.blocks:
            for layer in block.linears:
                if layer.role in ("o", "down"):
                    for end in ("weight", "bias"):
                        if f"{layer.name}.{end}" in block.parameters:
                            block.parameters[f"{layer.name}.{end}"][gone] = 0
        for i, kept in record["heads"].items():
            block = network.blocks[int(i)]
            o = block.parameters[next(la.name for la in block.linears if la.role == "o") + ".weight"]
            d = block.sizes.head_dim * block.sizes.heads // block.sizes.kv_heads
            for unit in set(range(block.sizes.kv_heads)) - set(kept):
                o[:, unit * d : (unit + 1) * d] = 0
    expected = network.forward(IDS).logits
    tolerance = 5e-3 if kind in ("qwen3", "gemma3") else 2e-4  # ε of norms of heads stays
    assert torch.allclose(Model(open_model(tmp_path / "out")).forward(IDS), expected, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(
    "kind, step, words",
    [
        ("llama", {"use": "sheared", "keep_channels": 0.01}, "leaves none"),
        ("gpt2", {"use": "random", "keep_channels": 0.5}, "subtract the mean"),
        ("gemma2", {"use": "sheared", "keep_heads": 0.5, "keep_blocks": 0.4}, "norms behind each branch"),
        ("gpt2", {"use": "l0"}, "no head size of its own"),
        ("bert", {"use": "l0", "keep_heads": 1.0, "keep_neurons": 0.5}, "needs a language-model head"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(kind, step, words, tmp_path):
    tiny_model(kind, tmp_path)
    with pytest.raises(RecipeError, match=words):
        plan(tmp_path, [step])


def test_a_text_that_is_too_short_says_what_is_needed(trained, tmp_path):
    (tmp_path / "short").write_text("just a few words")
    with pytest.raises(CalibrationError, match=r"short: the text has \d+ tokens, 2 held-out windows"):
        compress(trained, tmp_path / "out", [{"use": "l0", **TRAIN, "data": str(tmp_path / "short")}], overrides=SMALL)


def test_the_plan_counts_the_training(trained):
    long, short = (plan(trained, [{"use": "l0", "steps": n}]).estimates["seconds"] for n in (100_000, 1))
    assert long > 10 * short


def test_the_prompt_is_read_before_the_text_and_not_learned(trained):
    from lissom.methods.structured.compresso import Compresso
    from lissom.pipeline.gated import _Texts

    model = Model(open_model(trained))
    network, prompt = Network(model), "Less of me."
    head = torch.tensor(model.checkpoint.tokenizer()(prompt).input_ids)
    texts = _Texts(model, Compresso(prompt=prompt, length=16, batch=2, held_out=1), "builtin")
    ids = texts.data.at(0)
    out, own = texts.read(network, ids)
    whole = network.forward(torch.cat((head.expand(2, -1), ids), 1)).logits
    assert torch.equal(own, ids) and torch.equal(out.logits, whole[:, len(head) :])
    assert not torch.allclose(out.logits, network.forward(ids).logits, atol=1e-3)
