"""ONNX files run in onnxruntime and compared with lissom's own forward pass; the weights are lissom's codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lissom
from lissom.core import FormatError, OutputError
from lissom.export import export_onnx, open_model
from lissom.models import Model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def cpu_flags():
    """What the processor says that it has; empty where it is not asked by a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def run(path, ids, keep):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # onnxruntime multiplies four-bit blocks with activations rounded to int8 unless told to keep fp32
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if "avx2" in (flags := cpu_flags()) and not any("vnni" in flag for flag in flags):
        # its product of uint8 and int8 saturates at int16 there; unfused, the graph is computed as it stands
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]
    feed = {"input_ids": ids.numpy(), "attention_mask": keep.long().numpy()}
    return {n: torch.from_numpy(v) for n, v in zip(outputs, session.run(None, feed), strict=True)}


@torch.no_grad()
def ours(folder, ids, keep):
    """Hidden states of an encoder or logits of a decoder, by lissom."""
    model = Model(open_model(folder))
    h = model.embed(ids)
    for i in range(model.blocks):
        h = model.load_block(i).forward(h, mask=keep)
    return model.head(h) if model.has_head else h


@pytest.fixture(scope="module")
def ids():
    g = torch.Generator().manual_seed(0)
    keep = torch.ones(3, 19, dtype=torch.bool)
    keep[1, 11:] = False
    return torch.randint(2, 320, (3, 19), generator=g), keep


KINDS = ["bert", "llama", "llama-tied", "llama3-rope", "qwen3", "gpt2", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_models_give_the_same_numbers(kind, random_checkpoint, tmp_path, ids):
    made = export_onnx(random_checkpoint(kind), tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert made["quantized"] == 0 and not made["notes"]
    got, want = run(tmp_path / "m.onnx", *ids), ours(random_checkpoint(kind), *ids)
    keep = ids[1]
    assert float((got["last_hidden_state" if kind == "bert" else "logits"] - want)[keep].abs().max()) < 1e-4
    if kind == "bert":
        pooled = F.normalize((want * keep[..., None]).sum(1) / keep.sum(1, keepdim=True), dim=1)
        assert float((got["sentence_embedding"] - pooled).abs().max()) < 1e-5


STEPS = [
    (
        [{"use": "rtn", "bits": 8, "group_size": 0, "symmetric": True}, {"use": "activations", "per": "tensor"}],
        True,
    ),
    ([{"use": "rtn", "bits": 8, "group_size": 0, "symmetric": True}, {"use": "activations"}], True),
    ([{"use": "rtn", "bits": 4, "group_size": 16}], True),
    ([{"use": "rtn", "bits": 3, "group_size": 0}, {"use": "activations", "per": "tensor", "bits": 6}], True),
    ([{"use": "wanda", "sparsity": 0.5}], False),
    ([{"use": "gobo", "bits": 3}], False),
    ([{"use": "vs-quant", "bits": 4, "group_size": 16}], False),
]


@pytest.mark.parametrize(
    ("kind", "steps", "quantized"), [*(("bert", *s) for s in STEPS), *(("llama", *s) for s in STEPS[1:4])]
)
def test_artefacts_give_the_simulated_numbers(kind, steps, quantized, random_checkpoint, tmp_path, ids):
    recipe = {"steps": steps, "save": {"format": "packed", "dtype": "float32"}}
    small = ["calibration.samples=2", "calibration.length=24"]
    lissom.compress(random_checkpoint(kind), tmp_path / "out", recipe, overrides=small)
    made = export_onnx(tmp_path / "out", tmp_path / "m.onnx")
    layers = 12 if kind == "bert" else 14
    assert (made["quantized"], made["plain"]) == ((layers, 0) if quantized else (0, layers))
    assert bool(made["notes"]) == (steps[0]["use"] in ("gobo", "vs-quant"))
    kinds = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    if steps[-1].get("per") == "tensor" and steps[-1].get("bits", 8) == 8:
        assert kinds.count("QuantizeLinear") == 2 * 4  # one for each stage of each block
    got = run(tmp_path / "m.onnx", *ids)["last_hidden_state" if kind == "bert" else "logits"]
    want, keep = ours(tmp_path / "out", *ids), ids[1]
    gap = float((got - want)[keep].abs().max() / want[keep].abs().max())
    # a difference in the last bit may move a rounded activation to the next code
    print(
        "GAP",
        gap,
        float(F.cosine_similarity(got[keep], want[keep]).min()),
        float(((got - want)[keep].abs() > 0.01 * want[keep].abs().max()).float().mean()),
    )
    assert gap < (1e-3 if steps[-1]["use"] != "activations" else 5e-2)
    assert float(F.cosine_similarity(got[keep], want[keep]).min()) > (0.9999 if gap < 1e-3 else 0.999)


def test_weights_in_the_file_are_the_codes(random_checkpoint, tmp_path):
    """DequantizeLinear by hand: four bits by block, from the file's bytes."""
    recipe = {"steps": [{"use": "rtn", "bits": 4, "group_size": 16}], "save": {"format": "packed", "dtype": "float32"}}
    lissom.compress(random_checkpoint("bert"), tmp_path / "out", recipe, overrides=["samples=1", "length=8"])
    export_onnx(tmp_path / "out", tmp_path / "m.onnx")
    opened = open_model(tmp_path / "out")
    constants = {c.name: c for c in onnx.load(tmp_path / "m.onnx").graph.initializer}
    name = Model(opened).linears(1)[2].name
    codes = opened.layer(name).codes

    def nibbles(proto):
        raw = np.frombuffer(proto.raw_data, np.uint8)
        return np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: int(np.prod(proto.dims))].reshape(list(proto.dims))

    values, zero = nibbles(constants[f"{name}.codes"]), nibbles(constants[f"{name}.zero"])
    scale = onnx.numpy_helper.to_array(constants[f"{name}.scale"])
    weight = (values.astype(np.float32) - np.repeat(zero, 16, 0)) * np.repeat(scale, 16, 0)
    assert np.array_equal(weight.T, codes.decode().numpy())


def test_what_has_no_node_is_refused(random_checkpoint, tmp_path):
    for kind, reason in (
        ("gemma2", "not for gemma2"),
        ("bloom", "not for bloom"),
        ("smollm3", "layers without positions"),
    ):
        with pytest.raises(FormatError, match=reason):
            export_onnx(random_checkpoint(kind), tmp_path / "m.onnx")
    with pytest.raises(FormatError, match="sliding window"):
        export_onnx(random_checkpoint("mistral"), tmp_path / "m.onnx")
    recipe = {
        "steps": [{"use": "wanda", "sparsity": 0.5}, {"use": "kv-cache", "bits": 8}],
        "save": {"format": "packed"},
    }
    lissom.compress(random_checkpoint("llama"), tmp_path / "out", recipe, overrides=["samples=1", "length=8"])
    with pytest.raises(FormatError, match="kv-cache"):
        export_onnx(tmp_path / "out", tmp_path / "m.onnx")
    (tmp_path / "there.onnx").touch()
    with pytest.raises(OutputError, match="exists"):
        export_onnx(random_checkpoint("llama"), tmp_path / "there.onnx")
