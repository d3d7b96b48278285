"""The check of an artefact against transformers: in fp32, at the memory of what is stored."""

import copy
import json

import pytest
import torch
import transformers

import tiny
from lissom.core import FormatError
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress
from lissom.pipeline.verify import _widened, at_once, verify


def test_a_widened_model_computes_in_fp32_and_stays_as_stored():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    stored = transformers.LlamaForCausalLM(config).half().eval()
    wanted = copy.deepcopy(stored).float()
    before = {name: p.detach().clone() for name, p in stored.named_parameters()}
    seen = []
    stored.model.layers[1].self_attn.register_forward_hook(
        lambda module, *_: seen.append((module.q_proj.weight.dtype, stored.model.layers[0].mlp.up_proj.weight.dtype))
    )
    widened = _widened(stored)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(widened(ids).logits, wanted(ids).logits)
    assert seen == [(torch.float32, torch.float16)]  # one block at a time
    for name, parameter in widened.named_parameters():
        assert parameter.dtype == (torch.float16 if ".layers." in name else torch.float32)
        assert torch.equal(parameter.half(), before[name])


def test_lists_inside_a_block_are_widened_with_it():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Whole().bfloat16()
    wanted = copy.deepcopy(model).float()
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(_widened(model)(x), wanted(x))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_layer_that_decodes_otherwise_is_named(random_checkpoint, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    overrides = ["samples=2", "length=24", f"calibration.data={tiny.__file__}"]
    compress(random_checkpoint("llama"), tmp_path / "out", [{"use": "magnitude", "sparsity": 0.5}], overrides=overrides)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    wrong = next(row for row in manifest["layers"] if row["block"] == 1 and row["role"] == "up")
    wrong["checksum"] ^= 1
    with pytest.raises(FormatError, match=rf"{wrong['name']}: the weights loaded back"):
        verify(tmp_path / "out", manifest, torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, 32))


def test_no_more_blocks_are_loaded_back_together_than_fit(random_checkpoint, monkeypatch):
    model = Model(open_model(random_checkpoint("llama")))
    block = 4 * sum(layer.rows * layer.columns for layer in model.linears(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert [at_once(model, free) for free in (0, 4 * block, 12 * block - 1, 12 * block, 1000 * block)] == [
        1,
        1,
        2,
        3,
        4,
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert at_once(model, 1000 * block) == 2
