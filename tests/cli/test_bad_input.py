"""Bad input: one clear message, no traceback, an exit code, nothing left behind – and a JSON error for scripts."""

import errno
import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

SMALL = ["--samples", "2", "--length", "8"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(random_checkpoint, tmp_path):
    """A checkpoint of our own to damage."""
    return shutil.copytree(random_checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    from tiny import tiny_model

    tiny_model("llama", tmp_path / "model", shard="30KB")
    return tmp_path / "model"


@pytest.fixture
def refused(lissom, tmp_path):
    """Run `compress` and expect a refusal: all ``words`` on standard error, the same in JSON, nothing left."""

    def check(model, *arguments, words=(), code=None, recipe="wanda", left=False):
        out = tmp_path / "out"
        command = ["compress", model, out, "--recipe", recipe, *SMALL, *arguments]
        plain = lissom(*command)
        as_json = lissom(*command, "--json")
        for done in (plain, as_json):
            assert done.code != 0 and (code is None or done.code == code), (done.code, done.err)
            assert "Traceback" not in done.err + done.out
            for word in words:
                assert word in done.err, f"{word!r} is not in:\n{done.err}"
        error = json.loads(as_json.out)
        assert error["error"].endswith("Error")
        for word in words:
            assert word in error["message"]
        assert not out.exists()
        if not left:
            assert not out.with_name("out.partial").exists()
        return plain.err

    return check


# the checkpoint


def test_a_model_that_is_not_there(refused, tmp_path):
    refused(tmp_path / "nowhere", words=["nowhere", "does not exist"], code=3)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", words=["empty", "config.json"], code=3)


def test_a_missing_shard(refused, sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, words=["missing shard", victim.name], code=3)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_shard(refused, copy, keep):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    refused(copy, words=["model.safetensors", "truncated"], code=3)


def test_a_header_that_lies(refused, copy):
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    refused(copy, words=["model.safetensors"], code=3)


def test_a_missing_tensor_and_a_wrong_shape(refused, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(
        copy,
        words=["missing tensor model.layers.0.mlp.up_proj.weight", "gate_proj.weight has shape (3, 5)", "(48, 32)"],
        code=3,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(refused, copy, name, value):
    """Found by reading every weight once before the first is changed."""
    tensors = load_file(copy / "model.safetensors")
    tensors[name][1, 2] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, words=[name, "NaN or Inf"], code=3)


def test_an_unknown_architecture(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    refused(copy, words=["lama", "llama"], code=3)


def test_a_config_that_is_not_json(refused, copy):
    (copy / "config.json").write_text("{")
    refused(copy, words=["config.json", "not valid JSON"], code=3)


def test_pickles_are_refused(refused, copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(copy, words=["pytorch_model.bin", "pickle"], code=3)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors"])
def test_shards_outside_of_the_directory_are_refused(refused, copy, shard):
    names = load_file(copy / "model.safetensors").keys()
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    refused(copy, words=[shard, "leaves the directory"], code=3)


def test_a_tokenizer_of_another_model(refused, copy):
    from tiny import tiny_tokenizer

    tiny_tokenizer(512).save_pretrained(copy)
    refused(copy, words=["tokenizer", "320"], code=4)


def test_no_tokenizer(refused, copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused(copy, words=["tokenizer"], code=3)


# the calibration text


def test_calibration_text(refused, random_checkpoint, tmp_path):
    source, text = random_checkpoint("llama"), tmp_path / "text.txt"
    refused(source, "--calibration", tmp_path / "none.txt", words=["none.txt", "builtin"], code=4)
    text.write_text("  \n ")
    refused(source, "--calibration", text, words=["text.txt", "empty"], code=4)
    text.write_text("ab")
    refused(source, "--calibration", text, words=["tokens", "length 8"], code=4)
    text.write_bytes(b"caf\xe9 " * 100)
    refused(source, "--calibration", text, words=["text.txt", "UTF-8"], code=4)
    refused(source, "--calibration", tmp_path, words=[str(tmp_path)], code=4)


def test_samples_longer_than_the_model_has_positions(refused, random_checkpoint):
    """Learned positions end; rotary ones only get worse."""
    refused(random_checkpoint("gpt2"), "--length", "200", words=["200", "128"])


# the recipe


@pytest.mark.parametrize(
    "setting, words",
    [
        ("sparsity=1", ["[0, 1)", "not 1"]),
        ("sparsity=-0.5", ["[0, 1)"]),
        ("sparsity=lots", ["sparsity", "number"]),
        ("pattern=5:4", ["5:4", "N ≤ M"]),
        ("pattern=2:64", ["2:64"]),
        ("sparsty=0.5", ["sparsty", "did you mean 'sparsity'"]),
        ("bits=1", ["bits", "2 … 8"]),
        ("ignore=nonsense", ["nonsense", "matches no layer"]),
        ("only=[conv]", ["conv", "matches no layer"]),
        ("ignore='.'", ["no layer is left"]),
        ("format=zip", ["zip", "packed"]),
    ],
)
def test_settings(refused, random_checkpoint, setting, words):
    refused(random_checkpoint("llama"), "--set", setting, words=words, code=2)


def test_patterns_and_groups_that_do_not_divide(refused, random_checkpoint):
    source = random_checkpoint("llama")
    refused(
        source, "--set", "pattern=3:7", "--set", "sparsity=null", code=2,
        words=["3:7", "does not divide", "32 inputs", "q_proj"],
    )  # fmt: skip
    refused(
        source, "--set", "group_size=20", recipe="rtn", code=2, words=["group_size 20", "does not divide", "32 inputs"]
    )


def test_recipe_names_and_files(refused, random_checkpoint, tmp_path):
    source = random_checkpoint("llama")
    refused(source, recipe="agressive", words=["agressive", "did you mean 'aggressive'"], code=2)
    refused(source, recipe=tmp_path / "none.yaml", words=["none.yaml"], code=2)
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps:\n  - use: wandaa\n    sparsity: 0.5\n  - sparsity: 3\n")
    refused(source, recipe=bad, words=["wandaa", "did you mean 'wanda'", "step 2"], code=2)
    bad.write_text("steps: [")
    refused(source, recipe=bad, words=["bad.yaml", "not valid YAML"], code=2)


def test_no_samples(refused, random_checkpoint):
    refused(random_checkpoint("llama"), "--samples", 0, words=["samples", "0 × 8"], code=2)


def test_all_mistakes_at_once(refused, random_checkpoint):
    err = refused(
        random_checkpoint("llama"), "--set", "group_size=20", "--set", "ignore=nonsense", recipe="rtn", code=2
    )
    assert "group_size 20" in err and "nonsense" in err


# the output


def test_an_output_that_exists_is_not_touched(lissom, random_checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    done = lissom("compress", random_checkpoint("llama"), out, "-r", "wanda", *SMALL, "--json")
    assert done.code == 5 and str(out) in done.json["message"] and "exists" in done.err
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_an_output_in_no_directory(lissom, random_checkpoint, tmp_path):
    done = lissom("compress", random_checkpoint("llama"), tmp_path / "a" / "b", "-r", "wanda", *SMALL)
    assert done.code == 5 and "does not exist" in done.err


def test_a_disk_that_is_too_small(refused, random_checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(random_checkpoint("llama"), words=["free", "needs"], code=2)


@pytest.mark.parametrize("where", ["part-outer", "part-block-00001", "hidden", "records", "manifest", "config.json"])
def test_a_disk_that_fills_up_keeps_what_is_finished(lissom, random_checkpoint, tmp_path, monkeypatch, where):
    from pathlib import Path

    import safetensors.torch

    source, out = random_checkpoint("llama"), tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")

    def failing(original):
        def call(path, *args, **kwargs):
            if where in Path(path).name and kwargs.get("mode", args[0] if args else "r") not in ("r", "rb"):
                raise full
            return original(path, *args, **kwargs)

        return call

    def saving(original):
        def call(tensors, path, *args, **kwargs):
            if where in str(path):
                raise safetensors.SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
            return original(tensors, path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(Path.open))
        patch.setattr(Path, "write_text", failing(lambda p, *a, _o=Path.write_text, **k: _o(p, *a, **k)))
        patch.setattr(sys.modules["lissom.pipeline.workdir"], "save_file", saving(safetensors.torch.save_file))
        done = lissom("compress", source, out, "-r", "wanda", *SMALL)
    assert done.code == 5, done.err
    assert "No space left" in done.err and "Traceback" not in done.err
    assert not out.exists()
    done = lissom("compress", source, out, "-r", "wanda", *SMALL)
    assert done.code == 0, done.err
    assert "resuming" in done.err


# other verbs


def test_evaluate_refuses_as_clearly(lissom, random_checkpoint, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("short")
    for arguments, words in [
        (["--data", text], ["tokens", "length"]),
        (["--data", "nonsense"], ["nonsense"]),
        (["--against", tmp_path / "none"], ["none"]),
        (["--length", 0], ["length"]),
        (["--windows", -1], ["windows"]),
    ]:
        done = lissom("evaluate", random_checkpoint("llama"), *arguments, "--json")
        assert done.code != 0 and "Traceback" not in done.err
        for word in words:
            assert word in done.err + done.out, (arguments, done.err)


def test_report_of_something_else(lissom, tmp_path):
    done = lissom("report", tmp_path, "--json")
    assert done.code == 5 and "manifest.json" in done.json["message"]


def test_long_messages_are_not_folded(lissom, tmp_path):
    """A path in a message must stay one word for whoever copies it."""
    long = tmp_path / ("x" * 200)
    assert str(long) in lissom("inspect", long).err


@pytest.mark.parametrize(
    "arguments", [("compress", "demo"), ("compress", "demo", "out", "--nope"), ("evaluate", "demo", "--length", "x")]
)
def test_mistakes_in_the_arguments_are_told_in_json_too(lissom, arguments):
    done = lissom(*arguments, "--json")
    assert done.code == 2
    assert done.json["error"] == "UsageError" and done.json["message"] in done.err
