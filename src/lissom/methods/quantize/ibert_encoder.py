"""A BERT encoder in integers from the embedding to the pooled output, made of the kernels in :mod:`.ibert`.

    word + position + type (int8 tables) → LayerNorm → layers → mean over tokens
    layer: q,k,v (INT8) → scores → i-softmax (8 bit) → context → o → + residual → LayerNorm → up → i-GELU → down → + → LayerNorm

Weights: 8 bits symmetric, one scale per output row; biases int32 at the accumulator's scale. Activations: 8 bits
symmetric, static; the input of every linear has a scale per channel s · t_j, t_j = max|x_j|^α / max|W_j|^(1−α)
(SmoothQuant's), which costs nothing: it is part of the requantization before and of the integer weights after. The residual stream is carried beside at 16 bits (22 in the reference). Every linear is
requantized by dyadic numbers (:mod:`.activations`), so no float occurs between ids and pooled codes. GELU's output, never below −0.17,
has a zero point per channel, which is taken off again in the bias of the next layer.
:func:`calibrate` runs the float encoder once to find ranges; :func:`prepare` makes all integers; :func:`encode` runs.
Source: Kim et al., ICML 2021 (arXiv 2101.01321), §3; methods/02 §9. Post-training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import dyadic, requantize
from .ibert import IBert, i_gelu, i_layer_norm, i_softmax
from .smoothquant import smooth_scale

Weights = Mapping[str, Tensor]
_SCORE_SCALE, _GELU_TOP, _TOP, _WIDE = 2.0**-10, 2047, 127, 32767
_GELU_LOW = 0.17  # GELU(x) > −0.17
_LINEARS = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Encoder:
    """Float weights. ``embedding``: word, position, type (rows, width), gain, bias. Each of ``layers``: q, k, v, o, up,
    down with ``.bias`` beside them, norm1.gain, norm1.bias, norm2.gain, norm2.bias."""

    embedding: Weights
    layers: tuple[Weights, ...]
    heads: int
    epsilon: float = 1e-12


def float_encode(model: Encoder, ids: Tensor, keep: Tensor, seen: dict[str, Tensor] | None = None) -> Tensor:
    """The float reference: pooled output (batch, width) for ``ids``, ``keep`` (batch, tokens). ``seen`` gathers max|x_j|."""

    def see(name: str, x: Tensor) -> Tensor:
        if seen is not None:
            top = x[keep].abs().amax(0)
            seen[name] = torch.maximum(seen[name], top) if name in seen else top
        return x

    E = model.embedding
    x = E["word"][ids] + E["position"][: ids.shape[1]] + E["type"][0]
    see("sum", x)
    h = see("x0", F.layer_norm(x, x.shape[-1:], E["gain"], E["bias"], model.epsilon))
    for i, w in enumerate(model.layers):
        q, k, v = (see(f"{i}.{r}", F.linear(h, w[r], w[f"{r}.bias"])) for r in ("q", "k", "v"))
        parts = [t.unflatten(-1, (model.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        scores = parts[0] @ parts[1].transpose(2, 3) / math.sqrt(parts[0].shape[-1])
        p = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
        c = see(f"{i}.context", (p @ parts[2]).transpose(1, 2).flatten(2))
        h = see(f"{i}.sum1", F.linear(c, w["o"], w["o.bias"]) + h)
        h = see(f"{i}.mid", F.layer_norm(h, h.shape[-1:], w["norm1.gain"], w["norm1.bias"], model.epsilon))
        g = see(f"{i}.gelu", F.gelu(see(f"{i}.up", F.linear(h, w["up"], w["up.bias"]))))
        h = see(f"{i}.sum2", F.linear(g, w["down"], w["down.bias"]) + h)
        h = see(f"x{i + 1}", F.layer_norm(h, h.shape[-1:], w["norm2.gain"], w["norm2.bias"], model.epsilon))
    return (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def calibrate(model: Encoder, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Largest magnitude of every channel of every activation over the batches of (ids, keep)."""
    seen: dict[str, Tensor] = {}
    for ids, keep in batches:
        float_encode(model, ids, keep, seen)
    return seen


@dataclass(frozen=True)
class IntLinear:
    """``weight`` int8 (out, in), ``bias`` int32 (out,), multiplier ``m · 2^−n`` (out,), clamp to ± ``top``."""

    weight: Tensor
    bias: Tensor
    m: Tensor
    n: Tensor
    top: int

    def __call__(self, q: Tensor) -> Tensor:
        # products of 8-bit integers are exact in doubles, and doubles have a fast product
        acc = (q.double() @ self.weight.double().T).long() + self.bias
        return requantize(acc, self.m, self.n, 0, -self.top, self.top)


@dataclass(frozen=True)
class IntNorm:
    """Gain and bias inside the two requantizations, to 8 bits and to the 16-bit residual. All (width,) integers."""

    sign: Tensor
    bias: Tensor
    narrow: tuple[Tensor, Tensor]
    wide: tuple[Tensor, Tensor]

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = i_layer_norm(q)
        y = (y * self.sign + self.bias).clamp(-(2**31) + 1, 2**31 - 1)
        return requantize(y, *self.narrow, 0, -_TOP, _TOP), requantize(y, *self.wide, 0, -_WIDE, _WIDE)


@dataclass(frozen=True)
class IntLayer:
    """One layer in integers; the pairs are dyadic multipliers."""

    linears: Mapping[str, IntLinear]
    scores: tuple[Tensor, Tensor]
    context: tuple[Tensor, Tensor]
    gelu_scale: float  # fixes integer constants of i-GELU, no run-time float
    gelu: tuple[Tensor, Tensor, Tensor]  # and zero points, (inner,)
    residual: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    norms: tuple[IntNorm, IntNorm]


@dataclass(frozen=True)
class IntEncoder:
    """``embedding``: word, position, type as integers of one common scale."""

    embedding: Mapping[str, Tensor]
    norm: IntNorm
    layers: tuple[IntLayer, ...]
    heads: int


def _linear(W: Tensor, bias: Tensor, s_x: Tensor, s_y: float, top: int) -> IntLinear:
    """``s_x`` (in,): the channel scales of the input go into the weights before they are rounded."""
    V = W.double() * s_x
    unit = (V.abs().amax(1) / _TOP).clamp_min(1e-18)  # of the accumulator, (out,)
    q = torch.round(V / unit[:, None]).clamp(-_TOP, _TOP).to(torch.int8)
    b = torch.round(bias.double() / unit).clamp(-(2**30), 2**30).long()
    return IntLinear(q, b, *dyadic(unit / s_y), top)


def _norm(gain: Tensor, bias: Tensor, s8: Tensor, s16: float) -> IntNorm:
    unit = math.sqrt(len(gain)) / 2**30
    size = gain.double().abs().clamp_min(1e-9)
    sign = torch.where(gain < 0, -1, 1)
    b = torch.round(bias.double() / (size * unit)).clamp(-(2.0**31), 2.0**31).long()
    return IntNorm(sign, b, dyadic(size * unit / s8), dyadic(size * unit / s16))


def _pair(multiplier: float) -> tuple[Tensor, Tensor]:
    return dyadic(torch.tensor(multiplier, dtype=torch.float64))


def _heads(multiplier: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Dyadic multipliers (heads, 1, size) of a context whose heads are still apart."""
    m, n = dyadic(multiplier)
    return m.reshape(heads, 1, -1), n.reshape(heads, 1, -1)


def prepare(model: Encoder, seen: Mapping[str, Tensor], config: IBert | None = None) -> IntEncoder:
    """All integers of the encoder, given the ranges from :func:`calibrate`."""
    alpha = (config or IBert()).alpha

    def top(name: str) -> float:
        return max(float(seen[name].max()), 1e-9)

    def narrow(name: str) -> float:
        return top(name) / _TOP

    def wide(name: str) -> float:
        return top(name) * 1.25 / _WIDE  # room for sums beyond the calibrated range costs little here

    def channels(name: str, readers: Sequence[Tensor]) -> Tensor:
        """Scale of every channel of an activation that ``readers`` (out, in) multiply, double (in,)."""
        t = smooth_scale(seen[name], torch.cat(list(readers)), alpha)
        return (t * (seen[name] / t).max().clamp_min(1e-9) / _TOP).double()

    def after_gelu(i: int) -> tuple[Tensor, Tensor]:
        """Scales, and zero points in codes, of every channel between GELU and down."""
        high = seen[f"{i}.gelu"].double()
        low = high.clamp_max(_GELU_LOW)
        t = smooth_scale(seen[f"{i}.gelu"], model.layers[i]["down"], alpha).double()
        s = t * ((low + high) / t).max().clamp_min(1e-9) / (2 * _TOP)
        return s, torch.round(low / s).long() - _TOP

    def into_layer(i: int) -> Tensor:
        """Of the stream into layer i; nothing reads the last one, so its narrow form has one scale."""
        if i == len(model.layers):
            return torch.full_like(seen[f"x{i}"], narrow(f"x{i}")).double()
        return channels(f"x{i}", [model.layers[i][r] for r in "qkv"])

    E = model.embedding
    s = wide("sum")
    tables = {}
    for n in ("word", "position", "type"):  # int8 codes, one scale per row, added at one common scale
        step = (E[n].double().abs().amax(1, keepdim=True) / _TOP).clamp_min(1e-12)
        codes = torch.round(E[n] / step).clamp(-_TOP, _TOP).long()
        tables[n] = requantize(codes, *dyadic(step / s), 0, -_WIDE, _WIDE)
    norm = _norm(E["gain"], E["bias"], into_layer(0), wide("x0"))
    layers = []
    for i, w in enumerate(model.layers):
        head = w["q"].shape[0] // model.heads
        # finer steps than 0.0038 would carry i-GELU's product of erf and input beyond 32 bits
        gelu_in = max(top(f"{i}.up") / _GELU_TOP, 0.0038)
        into = dict.fromkeys("qkv", into_layer(i))
        into |= {r: channels(f"{i}.{a}", [w[r]]) for r, a in (("o", "context"), ("up", "mid"))}
        into["down"], zero = after_gelu(i)
        outof = {r: narrow(f"{i}.{r}") for r in "qkv"}
        outof |= {"o": wide(f"{i}.sum1"), "up": gelu_in, "down": wide(f"{i}.sum2")}
        tops = {"o": _WIDE, "down": _WIDE, "up": _GELU_TOP}
        linears = {r: _linear(w[r], w[f"{r}.bias"], into[r], outof[r], tops.get(r, _TOP)) for r in _LINEARS}
        down = linears["down"]
        linears["down"] = replace(down, bias=down.bias - down.weight.long() @ zero)
        gelu_out = i_gelu(torch.zeros(1, dtype=torch.long), gelu_in)[1]
        layers.append(
            IntLayer(
                linears,
                _pair(outof["q"] * outof["k"] / math.sqrt(head) / _SCORE_SCALE),
                _heads(outof["v"] * 2.0**-8 / into["o"], model.heads),
                gelu_in,
                (*dyadic(gelu_out / into["down"]), zero),
                (_pair(wide(f"x{i}") / outof["o"]), _pair(wide(f"{i}.mid") / outof["down"])),
                (
                    _norm(w["norm1.gain"], w["norm1.bias"], into["up"], wide(f"{i}.mid")),
                    _norm(w["norm2.gain"], w["norm2.bias"], into_layer(i + 1), wide(f"x{i + 1}")),
                ),
            )
        )
    return IntEncoder(tables, norm, tuple(layers), model.heads)


def integer_layer(layer: IntLayer, heads: int, q8: Tensor, q16: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """One layer on 8-bit codes and the 16-bit residual, both int64 (batch, tokens, width)."""
    q, k, v = (layer.linears[r](q8).unflatten(-1, (heads, -1)).transpose(1, 2) for r in ("q", "k", "v"))
    scores = requantize(_product(q, k.transpose(2, 3)), *layer.scores, 0, -(2**20), 2**20)
    p, _ = i_softmax(scores, _SCORE_SCALE, keep[:, None, None])
    context = requantize(_product(p, v), *layer.context, 0, -_TOP, _TOP).transpose(1, 2).flatten(2)
    h = layer.linears["o"](context) + requantize(q16, *layer.residual[0], 0, -_WIDE, _WIDE)
    q8, q16 = layer.norms[0](h)
    g, _ = i_gelu(layer.linears["up"](q8), layer.gelu_scale)
    g = requantize(g, *layer.gelu, -_TOP, _TOP)
    h = layer.linears["down"](g) + requantize(q16, *layer.residual[1], 0, -_WIDE, _WIDE)
    return layer.norms[1](h)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).long()  # exact: integers below 2^53


def encode(model: IntEncoder, ids: Tensor, keep: Tensor) -> Tensor:
    """Pooled output as integers (batch, width), at a scale that the whole vector shares."""
    E = model.embedding
    q8, q16 = model.norm(E["word"][ids] + E["position"][: ids.shape[1]] + E["type"][0])
    for layer in model.layers:
        q8, q16 = integer_layer(layer, model.heads, q8, q16, keep)
    total = (q16 * keep[..., None]).sum(1)
    return (total << 8) // keep.sum(1, keepdim=True)
