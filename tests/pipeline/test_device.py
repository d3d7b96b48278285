"""A run whose blocks compute on another device gives the bytes of a run on the host, and mixes tensors of both nowhere.

Where there is a CUDA device the runs are repeated there, and results are near those of the host.
"""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny
from device import TYPE, Device
from lissom.core import OutputError, RecipeError
from lissom.evaluate import evaluate
from lissom.methods import METHODS
from lissom.methods.quantize import METHODS as QUANTIZERS
from lissom.pipeline import blocks, compress
from lissom.pipeline.waiting import Aside

FEW = ["samples=2", "length=24", f"calibration.data={tiny.__file__}"]
PRUNE = {"use": "sparsegpt", "sparsity": 0.5}
ROUND = {"use": "rtn", "bits": 8}
SOLVERS = sorted(n for n, m in METHODS.items() if m.kind == "solver")
ALLOCATIONS = sorted(n for n, m in METHODS.items() if m.kind == "allocation" and n not in ("bits", "nm-layers"))
STRUCTURED = sorted(n for n, m in METHODS.items() if m.kind in ("units", "blocks"))
FREE = {"use": "sparsegpt", "sparsity": 0.5, "pattern": "n:4"}
QUICK = {
    "autoround": ["iterations=3"],
    "omniquant": ["steps=2"],
    "gptq-descent": ["passes=1"],
    "quip": ["passes=1"],
    "yaqa": ["sweeps=2"],
}

TRAIN = {"steps": 2, "batch": 2, "length": 16, "held_out": 2, "evaluate_every": 1}
GATES = {
    "l0": {"keep_heads": 0.5, "logits": 1.0},
    "head-gates": {"keep_heads": 0.5, "weights": "frozen"},
    "sheared": {"keep_blocks": 0.5, "keep_channels": 0.5},
    "compresso": {"keep_heads": 0.5, "prompt": "Less of me."},
    "lorashear": {"keep_heads": 0.5, "periods": 1},
}
SETTINGS = {"e-sparse": {"pattern": "2:4"}, "predictor-search": {"plans": 4, "search": 20, "verify": 1}}


def _solver(name):
    bits = {"bits": 4} if name in QUANTIZERS else {"sparsity": 0.5}
    first = [PRUNE] if name in ("refit", "dsnot") else []
    return [*first, {"use": name} | SETTINGS.get(name, bits)]


CHAINS = {
    **{n: _solver(n) for n in SOLVERS},
    **{n: [{"use": n} | SETTINGS.get(n, {}), PRUNE] for n in ALLOCATIONS},
    **{
        n: [{"use": n, "keep_blocks": 0.5} if n == "shortgpt" else {"use": n, "keep_neurons": 0.75}] for n in STRUCTURED
    },
    "global": [PRUNE | {"per": "global"}],
    "spread auto": [{"use": "loss-clusters", "spread": "auto"}, PRUNE],
    "rows by Fisher": [{"use": "loss-clusters"}, {"use": "alps", "sparsity": 0.6, "row_fisher": 0.5, "bits": 4}],
    "shots": [PRUNE | {"shots": 2}],
    "N:4 by layer": [{"use": "channel-permutation"}, {"use": "nm-layers"}, FREE],
    "bits by layer": [{"use": "bits"}, {"use": "gptq", "bits": 3}],
    "channels": [{"use": "llm-pruner", "keep_channels": 0.5}],
    "widths": [{"use": "flap", "keep_neurons": 0.75, "keep_heads": 0.5, "spread": 0.1}],
    "widths by search": [{"use": "flap", "keep_neurons": 0.75, "spread": 0.2, "search": 4}],
    "nvfp4": [{"use": "codebook", "table": "nvfp4"}],
    "quarot": [{"use": "quarot", "online": True}, {"use": "gptq", "bits": 4}],
    "spinquant": [{"use": "spinquant", "steps": 2}, ROUND],
    "smoothed": [{"use": "smoothquant"}, ROUND, {"use": "activations", "bits": 8}],
    "static": [ROUND, {"use": "activations", "bits": 8, "per": "tensor"}],
    "cache": [{"use": "kv-cache", "bits": 4}],
    "static cache": [{"use": "kv-cache", "bits": 4, "static": True}],
    "reconstruct": [PRUNE, {"use": "reconstruct", "epochs": 1}],
    "heal": [PRUNE, {"use": "heal"} | TRAIN],
    "drift": {"steps": [{"use": "gptq", "bits": 4, "group_size": 16}], "calibration": {"drift": 0.5}},
    "healed codes": {
        "steps": [{"use": "gptq", "bits": 4, "group_size": 16}, {"use": "heal"} | TRAIN],
        "save": {"format": "packed"},
    },
    **{n: [{"use": n} | cut | TRAIN] for n, cut in GATES.items()},
    "zeroquant": [ROUND, {"use": "zeroquant", "steps": 2}],
}


@pytest.fixture(autouse=True)
def _same_arithmetic(monkeypatch):
    """torch's loop, plain attention and plain Adam on both sides: the fused ones are for the host, and add in another order."""
    monkeypatch.setattr("lissom.kernels.columns.extension", None)
    for name in ("Adam", "AdamW"):
        plain = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *args, fused=False, plain=plain, **rest: plain(*args, **rest))
    with sdpa_kernel(SDPBackend.MATH):
        yield


TRAINED = {"reconstruct", "zeroquant", "heal", *GATES}  # gradients add in another order there
ROUNDED = {
    "obs",
    "llm-surgeon",
}  # their einsum adds in another order there; the surgeon's later layers then differ at will


# choices that follow from each other: a millionth added to the Gram matrices changes their weights by a third on the host too;
# on some processors the surgeon's einsum alone decides one of them otherwise
UNSTEADY = {"alps", "rows by Fisher", "llm-surgeon", "yaqa"}
DEVICES = [TYPE, "cuda"] if torch.cuda.is_available() else [TYPE]


def entered(device):
    return Device() if device == TYPE else nullcontext()


def tensors(folder):
    return {k: t for p in folder.glob("*.safetensors") for k, t in load_file(p).items()}


def on_both(model, tmp_path, steps, overrides=(), device=TYPE, **more):
    made = compress(model, tmp_path / "host", steps, overrides=[*FEW, *overrides], device="cpu", **more)
    with entered(device):
        there = compress(model, tmp_path / "device", steps, overrides=[*FEW, *overrides], device=device, **more)
    named = torch.cuda.get_device_name() if device == "cuda" else device
    assert (made["device"], there["device"]) == ("cpu", named)
    return tensors(tmp_path / "host"), tensors(tmp_path / "device")


def layer_error(folder):
    return sum(layer["relative_error"] for layer in json.loads((folder / "manifest.json").read_text())["layers"])


def near(a, b):
    """Tensors of the host and of a GPU: choices between equals may fall otherwise there."""
    if not a.is_floating_point():
        return a.shape == b.shape and (a == b).double().mean() > 0.8
    return a.shape == b.shape and (a - b).float().norm() <= 0.1 * a.float().norm() + 1e-6


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("name", CHAINS)
def test_same_bytes_on_another_device(random_checkpoint, tmp_path, name, place):
    host, device = on_both(random_checkpoint("llama"), tmp_path, CHAINS[name], QUICK.get(name, []), place)
    assert host.keys() == device.keys()
    if name in UNSTEADY and (place == "cuda" or name in ROUNDED):
        mine, theirs = (layer_error(tmp_path / made) for made in ("host", "device"))
        assert abs(theirs / mine - 1) < 0.1
    elif place == "cuda":
        assert [k for k in host if not near(host[k], device[k])] == []
    elif name in TRAINED:
        assert all(torch.allclose(host[k].float(), device[k].float(), atol=1e-3) for k in host)
    elif name in ROUNDED:
        first = [k for k in host if ".0.self_attn." in k and "o_proj" not in k]
        assert all(
            torch.allclose(host[k], device[k], atol=1e-3) and ((host[k] == 0) == (device[k] == 0)).all() for k in first
        )
    else:
        assert [k for k in host if not torch.equal(host[k], device[k])] == []


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "bloom", "qwen3", "phi"])
def test_every_kind_of_position_and_norm_finds_its_tensors_there(random_checkpoint, tmp_path, kind, place):
    steps = [{"use": "sparsegpt", "sparsity": 0.5, "bits": 4}]
    host, device = on_both(random_checkpoint(kind), tmp_path, steps, device=place)
    assert all((torch.equal if place == TYPE else near)(host[k], device[k]) for k in host)


@pytest.mark.parametrize("more", [{"spill": True}, {}])
def test_waiting_activations_leave_the_device(random_checkpoint, tmp_path, monkeypatch, more):
    """Between the stages, on the host or on disk: what is on the device is one batch at a time."""
    seen = []
    put = Aside.put

    def spy(self, index, state):
        seen.append({t.device.type for t in state.values() if isinstance(t, torch.Tensor)})
        put(self, index, state)
        assert not [t for t in state.values() if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "cpu" for t in getattr(self, "_kept", {}).get(index, {}).values())

    monkeypatch.setattr(Aside, "put", spy)
    host, device = on_both(random_checkpoint("llama"), tmp_path, [PRUNE], **more)
    assert {TYPE} in seen
    assert all(torch.equal(host[k], device[k]) for k in host)


@pytest.mark.parametrize("fails", ["dump_json", "keep_hidden"])
def test_a_block_that_could_not_be_written_beside_the_next_is_done_again(
    random_checkpoint, tmp_path, monkeypatch, fails
):
    """The error comes to the caller, what was finished is kept, and the next run ends with the host's bytes."""
    model, real = random_checkpoint("llama"), getattr(blocks, fails)
    compress(model, tmp_path / "host", [PRUNE], overrides=FEW, device="cpu")

    def full(*args):
        raise OutputError("no space left")

    monkeypatch.setattr(blocks, fails, full)
    with Device(), pytest.raises(OutputError, match="no space"):
        compress(model, tmp_path / "device", [PRUNE], overrides=FEW, device=TYPE)
    work = tmp_path / "device.partial"
    assert (work / "part-block-00000.safetensors").exists() and not (work / "part-block-00001.safetensors").exists()
    monkeypatch.setattr(blocks, fails, real)
    with Device():
        compress(model, tmp_path / "device", [PRUNE], overrides=FEW, device=TYPE)
    files = sorted((tmp_path / "host").glob("*.safetensors"))
    assert files and all(f.read_bytes() == (tmp_path / "device" / f.name).read_bytes() for f in files)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_device_with_room_keeps_what_waits(random_checkpoint, tmp_path, monkeypatch, missing):
    model, put, asked = random_checkpoint("llama"), Aside.put, []
    config = json.loads((model / "config.json").read_text())
    numbers = 48 * (config["hidden_size"] + config["intermediate_size"])  # of two samples of 24 tokens
    monkeypatch.setattr("lissom.pipeline.waiting.room", lambda _: 2 * 4 * numbers - missing)
    monkeypatch.setattr(Aside, "put", lambda *args: asked.append(0) or put(*args))
    host, device = on_both(model, tmp_path, [PRUNE])
    assert all(torch.equal(host[k], device[k]) for k in host)
    assert bool(asked) == bool(missing)


def test_bits_for_a_size_are_chosen_there(random_checkpoint, tmp_path):
    steps = {"steps": [{"use": "gptq", "bits": 4, "group_size": 16}], "save": {"format": "packed"}}
    host, device = on_both(random_checkpoint("llama"), tmp_path, steps, ["target.size=30KB"])
    assert host.keys() == device.keys() and all(torch.equal(host[k], device[k]) for k in host)


def test_evaluation_there_gives_the_same_numbers(random_checkpoint, tmp_path):
    model = random_checkpoint("gpt2")
    compress(model, tmp_path / "out", [PRUNE], overrides=FEW, device="cpu")
    settings = {"data": tiny.__file__, "length": 16, "count": 2, "against": model}
    here = evaluate(tmp_path / "out", **settings, device="cpu")
    with Device():
        there = evaluate(tmp_path / "out", **settings, device=TYPE)
    assert there["perplexity"] == here["perplexity"] and there["kl"] == here["kl"] > 0


def test_a_run_does_not_go_on_from_another_device(random_checkpoint, tmp_path):
    """Its bytes would be of both."""
    model, stop = random_checkpoint("llama"), RuntimeError("stop")

    def tick(label, done, total):
        if label == "compress":
            raise stop

    with pytest.raises(RuntimeError, match="stop"):
        compress(model, tmp_path / "out", [PRUNE], overrides=FEW, device="cpu", tick=tick)
    with Device(), pytest.raises(OutputError, match="device: was 'cpu', now 'lazy'"):
        compress(model, tmp_path / "out", [PRUNE], overrides=FEW, device=TYPE)


@pytest.mark.parametrize("device", ["cuda:7", "nonsense", "meta", TYPE])
def test_a_device_that_is_not_there_is_refused_before_any_work(random_checkpoint, tmp_path, device):
    with pytest.raises(RecipeError, match=f"device {device} cannot be used here"):
        compress(random_checkpoint("llama"), tmp_path / "out", [PRUNE], overrides=FEW, device=device)
    assert not list(tmp_path.iterdir())


def test_tensors_of_two_places_do_not_meet():
    """Of the device itself: what the tests above rest on."""
    with Device():
        there = torch.ones(3, 4).to(TYPE)
        for meet in (
            lambda: there + torch.ones(3, 4),
            lambda: torch.ones(2, 3) @ there,
            lambda: torch.ones(5)[there[0].long()],
        ):
            with pytest.raises(RuntimeError, match="not on one device"):
                meet()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert (there * torch.tensor(2.0)).sum().item() == 24.0 and (there @ there.T).device.type == TYPE
