"""I-BERT's kernels: GELU, exponential, softmax, square root and LayerNorm in integers only.

An integer tensor q stands for q · S. Scales are known beforehand, so everything made of them is an integer constant;
at run time there are additions, products, shifts and integer divisions, nothing else. Any a(x + b)² + c becomes

    q_b = ⌊b/S⌋,   q_c = ⌊c/(a S²)⌋,   out = (q + q_b)² + q_c   at scale a S²

    i-GELU     x/2 · (1 + L(x/√2)),  L(x) = sgn(x) [a (min(|x|, −b) + b)² + 1],  a = −.2888, b = −1.769
    i-exp      x = −z ln2 + p with p ∈ (−ln2, 0];  exp(p) ≈ .3585 (p + 1.353)² + .344;  result ≫ z
    i-sqrt     Newton: x ← ⌊(x + ⌊n/x⌋)/2⌋ from 2^⌈bits(n)/2⌉
    LayerNorm  y = q − mean,  y · ⌊2³¹/√Σy²⌋ / 2 at scale √n/2³⁰

Tensors are int64 here; with 12-bit inputs of GELU and scores at scale 2⁻¹⁰ all results but the product inside the
requantization fit 32 bits. Source: Kim et al., ICML 2021 (arXiv 2101.01321), alg. 1–4; kssteven418/I-BERT; methods/02 §9.
Largest errors (tested): |i-GELU − GELU| ≤ 1.9e-2, |i-exp − exp| ≤ 2e-3 as S → 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IBert:
    """A step: the whole encoder in integers. ``alpha``: how much of an activation's outliers moves into the weights."""

    alpha: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha:g}")


_ERF = (-0.2888, -1.769, 1.0)
_EXP = (0.35815147, 1.35366, 0.34373)  # the repository's digits: exactly 1 at 0
_MAX_SHIFT = 30


def i_poly(q: Tensor, scale: float, a: float, b: float, c: float) -> tuple[Tensor, float]:
    """``a(x + b)² + c`` and its scale, which has the sign of a."""
    return (q + math.floor(b / scale)).square() + math.floor(c / (a * scale * scale)), a * scale * scale


def i_gelu(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """GELU of ``q · scale`` (int64, any shape), with its scale > 0."""
    a, b, c = _ERF
    inner = scale / math.sqrt(2)
    limit = -math.floor(b / inner)
    poly, scale_l = i_poly(q.abs().clamp_max(limit), inner, a, b, c)
    erf = q.sign() * poly
    one = math.floor(1.0 / scale_l)
    return -(q * (erf + one)), -scale * scale_l / 2


def i_exp(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """``exp(q · scale)`` for q ≤ 0."""
    ln2 = max(1, math.floor(math.log(2) / scale))
    z = (-q // ln2).clamp_max(_MAX_SHIFT)
    p = (q + z * ln2).clamp_min(-ln2)  # beyond the last shift the result is zero anyway
    poly, out = i_poly(p, scale, *_EXP)
    return poly >> z, out


def i_softmax(q: Tensor, scale: float, keep: Tensor | None = None, bits: int = 8) -> tuple[Tensor, float]:
    """Softmax along the last axis as unsigned ``bits``-bit codes at scale 2^−bits; ``keep`` (bool) marks real keys."""
    if keep is not None:
        q = torch.where(keep, q, q.amin())
    e, _ = i_exp(q - q.amax(-1, keepdim=True), scale)
    if keep is not None:
        e = e * keep
    factor = (1 << 32) // e.sum(-1, keepdim=True).clamp_min(1)
    rounding = 1 << (31 - bits)
    return ((e * factor + rounding) >> (32 - bits)).clamp_max((1 << bits) - 1), 2.0**-bits


def i_sqrt(n: Tensor) -> Tensor:
    """``⌊√n⌋`` for n ≥ 0, by Newton's iteration from above (which never rises once it is above the root)."""
    exponent = torch.zeros_like(n)
    rest = n.clone()
    for _ in range(63):  # bit length, without a float logarithm
        exponent += (rest > 0).long()
        rest >>= 1
    x = torch.ones_like(n) << ((exponent + 1) // 2)
    for _ in range(40):
        new = (x + n // x.clamp_min(1)) >> 1
        done = new >= x
        x = torch.where(done, x, new)
        if bool(done.all()):
            break
    return torch.where(n > 0, x, torch.zeros_like(x))


def i_layer_norm(q: Tensor) -> tuple[Tensor, float]:
    """Centred and normalised along the last axis (no gain, no bias). |q| < 2²⁴ keeps Σy² within 63 bits.

    The scale of the input cancels. Gain and bias follow in the requantization (``ibert_encoder``).
    """
    n = q.shape[-1]
    total = q.sum(-1, keepdim=True)
    mean = (2 * total + n) // (2 * n)  # to nearest
    y = q - mean
    root = i_sqrt(y.square().sum(-1, keepdim=True)).clamp_min(1)
    factor = (1 << 31) // root
    return (y * factor) >> 1, math.sqrt(n) / 2**30
