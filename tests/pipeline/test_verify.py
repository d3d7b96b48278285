"""The check of an artefact against transformers: in fp32, at the memory of what is stored."""

import copy

import torch
import transformers

from lissom.pipeline.verify import _widened


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
