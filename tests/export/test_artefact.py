"""Artefacts on disk: every format opens alike, equal runs give equal bytes, damage and full disks are reported."""

import errno
import json
import os
import shutil

import pytest
import torch
from solving import solve

from lissom.core import NM, CheckpointError, FormatError, Grid, OutputError, RecipeError, Sparse
from lissom.export import CODECS, ArtefactWriter, Dense, Layout, Packed, codec_named, load, open_model, unpack
from lissom.export.files import read_metadata, verify_file, write_file
from lissom.models import Checkpoint, Model

NAMES = ["dense", "packed", "compressed-tensors", "int-quantized"]


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_registry():
    assert list(CODECS) == [*NAMES, "gptq", "gptq-v2"]  # the last two hold codes only: test_gptq.py
    with pytest.raises(FormatError, match="choose one of dense, packed"):
        codec_named("zip")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [None, Sparse(0.6), NM(2, 4)])
def test_every_format_opens_alike(artefact, ids, tmp_path, name, pattern):
    from transformers import AutoModelForCausalLM

    folder, weights = artefact(codec_named(name), [Grid(8, 16)], pattern)
    opened = open_model(folder)
    assert isinstance(opened, Checkpoint)
    assert opened.format == (name if name in ("dense", "packed") else "compressed-tensors")
    assert opened.problems() == []
    assert not hasattr(opened.config, "quantization_config")
    for layer, weight in weights.items():
        assert torch.equal(opened.tensor(f"{layer}.weight"), weight)
        assert opened.shape(f"{layer}.weight") == tuple(weight.shape)
        stored = opened.layer(layer)
        assert torch.equal(stored.weight, weight)
        if name != "dense":
            assert stored.codes is not None and torch.equal(stored.codes.decode(), weight)
    model = Model(opened)
    assert torch.equal(model.load_block(1).weight("model.layers.1.mlp.up_proj"), weights["model.layers.1.mlp.up_proj"])
    unpack(folder, tmp_path / "dense", "float32")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(restored(ids).logits, load(folder, "float32")(ids).logits)
    assert not (tmp_path / "dense.partial").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unpack_rounds_decoded_weights_once(artefact, tmp_path, dtype):
    folder, weights = artefact(Packed(), [Grid(4, 16)], Sparse(0.5))
    out = open_model(unpack(folder, tmp_path / "dense", dtype))
    for layer, weight in weights.items():
        assert torch.equal(out.tensor(f"{layer}.weight"), weight.to(getattr(torch, dtype)))
    assert out.config.dtype == getattr(torch, dtype)
    with pytest.raises(OutputError, match="exists"):
        unpack(folder, tmp_path / "dense")
    with pytest.raises(RecipeError, match="float16, bfloat16, float32"):
        unpack(folder, tmp_path / "other", "int8")


def test_embeddings_can_be_packed_and_stay_tied(tiny, tmp_path, ids):
    source, writer, codec = open_model(tiny), ArtefactWriter(tmp_path / "out"), Packed()
    embed = solve(source.tensor("model.embed_tokens.weight"), None, Grid(8, 16))
    rest = {n: source.tensor(n) for n in source.names() if n != "model.embed_tokens.weight"}
    tensors = {f"model.embed_tokens.{k}": v for k, v in codec.encode(embed, Layout()).items()}
    writer.add("all", tensors | rest, {"model.embed_tokens": codec.entry(embed, Layout())})
    writer.finish(source, torch.float32, codec.config(writer.entries(), Layout()))
    assert (tmp_path / "out" / "model.safetensors").exists()
    model = load(tmp_path / "out")
    assert torch.equal(model.model.embed_tokens.weight, embed.weight)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_conv1d_layouts(tmp_path, ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4)).save_pretrained(
        tmp_path / "gpt2"
    )
    source = open_model(tmp_path / "gpt2")
    name = next(n for n in source.names() if n.endswith("mlp.c_fc.weight")).removesuffix(".weight")
    solved = solve(source.tensor(f"{name}.weight").T.contiguous(), NM(2, 4), Grid(4, 16))
    assert torch.equal(source.layer(name).weight, source.tensor(f"{name}.weight").T)
    for codec in (Dense(), Packed()):
        layout = Layout(torch.float32, "2:4", transposed=True)
        writer = ArtefactWriter(tmp_path / codec.name)
        rest = {n: source.tensor(n) for n in source.names() if n != f"{name}.weight"}
        tensors = {f"{name}.{k}": v for k, v in codec.encode(solved, layout).items()}
        writer.add("all", tensors | rest, {name: codec.entry(solved, layout)})
        writer.finish(source, torch.float32, codec.config(writer.entries(), layout))
        opened = open_model(tmp_path / codec.name)
        assert torch.equal(opened.tensor(f"{name}.weight"), solved.weight.T)
        assert torch.equal(opened.layer(name).weight, solved.weight)
        assert torch.equal(load(opened).state_dict()[f"{name}.weight"], solved.weight.T)
        assert opened.problems() == []


def test_equal_runs_give_equal_bytes(artefact):
    a, _ = artefact(Packed(), [Grid(4, 16)], Sparse(0.7), out="a")
    b, _ = artefact(Packed(), [Grid(4, 16)], Sparse(0.7), out="b")
    assert files_of(a) == files_of(b)


def test_interrupted_and_resumed_gives_the_same_bytes(tmp_path, tiny):
    source = open_model(tiny)
    names = source.names()
    parts = {f"p{i}": {n: source.tensor(n) for n in names[i::3]} for i in range(3)}

    whole = ArtefactWriter(tmp_path / "whole")
    for part, tensors in parts.items():
        whole.add(part, tensors)
    whole.finish(source, torch.float32)

    first = ArtefactWriter(tmp_path / "again")
    first.add("p1", parts["p1"])
    first.add("p0", parts["p0"])
    (first.folder / "part-p2.safetensors.tmp").write_bytes(b"half of it")
    damaged = first.folder / "part-p0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    second = ArtefactWriter(tmp_path / "again")
    assert [second.has(p) for p in ("p0", "p1", "p2")] == [False, True, False]
    second.add("p0", parts["p0"])
    second.add("p2", parts["p2"])
    second.finish(source, torch.float32)
    third = ArtefactWriter(tmp_path / "again")  # killed after the files were numbered
    assert all(third.has(p) for p in parts)
    third.finish(source, torch.float32)
    assert files_of(whole.folder) == files_of(third.folder)
    assert sum(third.bytes_by_part().values()) == open_model(third.folder).bytes


def test_a_name_in_two_parts_is_refused(tmp_path):
    writer = ArtefactWriter(tmp_path)
    writer.add("a", {"x": torch.ones(2)})
    with pytest.raises(OutputError, match="part b brings x again"):
        writer.add("b", {"x": torch.ones(2)})


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    writer = ArtefactWriter(tmp_path)
    writer.add("a", {"x": torch.ones(2)})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            writer.add("b", {"y": torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["part-a.safetensors"]
    again = ArtefactWriter(tmp_path)
    assert again.has("a") and not again.has("b")


def test_files_are_what_the_library_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "b": torch.arange(5, dtype=torch.uint8), "a": torch.randn(2, 3), "empty": torch.zeros(0),
        "half": torch.ones(3, dtype=torch.bfloat16), "turned": torch.randn(3, 2).T, "scalar": torch.tensor(7),
    }  # fmt: skip
    size = write_file(tmp_path / "f.safetensors", tensors, {"part": "p"})
    back = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    assert size == (tmp_path / "f.safetensors").stat().st_size
    assert read_metadata(tmp_path / "f.safetensors")["part"] == "p"
    assert set(verify_file(tmp_path / "f.safetensors")) == set(tensors)


@pytest.mark.parametrize("name", ["packed", "compressed-tensors", "dense"])
def test_damage_is_found(artefact, tmp_path, name):
    folder, _ = artefact(codec_named(name), [Grid(4, 16, True)], Sparse(0.5))
    shard = folder / "model-00001-of-00003.safetensors"
    good = shard.read_bytes()

    def use():
        Model(open_model(folder)).load_block(0)

    use()
    shard.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    with pytest.raises(FormatError, match="does not match its checksum"):
        use()
    shard.write_bytes(good[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        use()
    shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        use()
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing shard"):
        use()


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_wrong_configurations_are_found(artefact, tmp_path):
    folder, _ = artefact(Packed(), [Grid(4, 16)], NM(2, 4))
    layer = "model.layers.0.self_attn.q_proj"

    def fails(change, error, match):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change_config(copy, change)
        with pytest.raises(error, match=match):
            Model(open_model(copy)).load_block(0)

    fails(lambda q: q.update(version=2), FormatError, "version 2 of the format")
    fails(lambda q: q.update(quant_method="exl9"), CheckpointError, "exl9")
    fails(lambda q: q["layers"].pop(layer), CheckpointError, "missing tensor")
    fails(lambda q: q["layers"].update({"x.y": q["layers"][layer]}), CheckpointError, "no tensors of the layer x.y")
    fails(lambda q: q["layers"][layer].update(bits=3), FormatError, f"{layer} in .*bytes instead of")
    fails(lambda q: q["layers"][layer].update(pattern="4:4"), FormatError, layer)
    fails(lambda q: q["layers"][layer].update(shape=[16, 64]), CheckpointError, "shape")
