"""Activations: simulated (fake) quantization, static or dynamic, and the integer-only arithmetic that it stands for.

Static: the range comes from calibration and is constant. Dynamic: from the live tensor, per tensor or per token.
Integer-only (methods/02 §0.3): with x ≈ s_x (q_x − z_x), W ≈ s_w q_w, y ≈ s_y (q_y − z_y),

    acc = Σ (q_x − z_x) q_w + q_b            int32, bias at scale s_x s_w
    q_y = clamp(round(acc · M) + z_y),       M = s_x s_w / s_y ≈ m · 2^−n  (dyadic, m a 31-bit integer)

Source: Jacob et al., CVPR 2018 (arXiv 1712.05877), §2.2; activations of shape (tokens, in), weights (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import NumericalError
from . import ranges

Calibrate = Literal["minmax", "absmax", "ema", "percentile", "mse", "entropy"]


@dataclass(frozen=True)
class ActivationGrid:
    """``per`` tensor | token; ``dynamic``: range of the live tensor. ``calibrate`` is used for static ranges only."""

    bits: int = 8
    symmetric: bool = True
    per: Literal["tensor", "token"] = "token"
    dynamic: bool = True
    calibrate: Calibrate = "absmax"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 … 8, not {self.bits}")
        if self.per == "token" and not self.dynamic:
            raise ValueError("tokens are not known before they arrive: per-token grids must be dynamic")

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Interval of each group of ``x: (groups, n)``."""
        if self.calibrate == "percentile":
            return ranges.percentile(x, self.percent)
        if self.calibrate == "mse":
            return ranges.mse(x, self.bits, self.symmetric)
        if self.calibrate == "entropy":
            return ranges.entropy(x, self.bits)
        return ranges.absmax(x) if self.calibrate == "absmax" else ranges.minmax(x)


def calibrated(x: Tensor, config: ActivationGrid) -> tuple[Tensor, Tensor]:
    """Static scale and zero point, (1, 1), from calibration activations ``x: (tokens, in)``."""
    return ranges.grid(*config.range(x.reshape(1, -1)), config.bits, config.symmetric)


def fake_activation(x: Tensor, config: ActivationGrid, static: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Simulated quantization of ``x: (…, in)``; ``static`` from :func:`calibrated` when the grid is not dynamic."""
    shape = x.shape
    flat = x.reshape(-1, shape[-1])
    if static is None:
        if not config.dynamic:
            raise ValueError("a static activation grid needs its calibrated scale and zero point")
        live = flat if config.per == "token" else flat.reshape(1, -1)
        bounds = ranges.absmax(live) if config.symmetric else ranges.minmax(live)
        static = ranges.grid(*bounds, config.bits, config.symmetric)
    return ranges.fake(flat, *static, config.bits, config.symmetric).reshape(shape)


def dyadic(multiplier: Tensor, bits: int = 31) -> tuple[Tensor, Tensor]:
    """``M ≈ m · 2^−n`` with integers m < 2^bits and n, of M's shape (int64); the relative error is below 2^−(bits−1)."""
    if not bool((multiplier > 0).all()) or not bool(torch.isfinite(multiplier).all()):
        raise ValueError("a requantization multiplier must be positive and finite")
    mantissa, exponent = torch.frexp(multiplier.double())
    m = torch.round(mantissa * 2**bits).long()
    carry = m == 2**bits  # rounding reached the next power of two
    return torch.where(carry, m // 2, m), bits - exponent.long() - carry.long()


def requantize(acc: Tensor, m: Tensor, n: Tensor, zero: int | Tensor, low: int, high: int) -> Tensor:
    """``clamp(round(acc · m · 2^−n) + zero, low, high)`` in integers; halves round up. acc: |acc| < 2^31."""
    shift = n.clamp_min(1)
    product = acc.long() * m
    # a shift beyond 62 leaves nothing of a 62-bit product
    rounded = torch.where(shift > 62, torch.zeros_like(product), (product + (1 << (shift.clamp_max(62) - 1))) >> shift)
    rounded = torch.where(n < 1, product << (-n).clamp_min(0), rounded)
    return (rounded + zero).clamp(low, high)


def integer_linear(
    q_x: Tensor, z_x: int, q_w: Tensor, bias: Tensor | None, M: Tensor, z_y: int, bits: int = 8, symmetric: bool = True
) -> Tensor:
    """A linear layer in integers: ``q_x (tokens, in)``, ``q_w (out, in)``, ``bias (out,)`` int at scale s_x s_w,
    ``M (out,)`` = s_x s_w / s_y. Returns int64 codes (tokens, out)."""
    acc = (q_x.long() - z_x) @ q_w.long().T
    if bias is not None:
        acc = acc + bias.long()
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    return requantize(acc, *dyadic(M), z_y, -top if symmetric else 0, top)


@dataclass(frozen=True)
class Activations:
    """A step: inputs of linear layers are rounded at run time.

    ``bits`` 2 … 8. ``per`` token: the scale of each token is found when it arrives; tensor: one scale for a stage, found on
    the calibration text by ``calibrate`` (minmax and absmax are the same here: codes are symmetric). ``percent`` of the
    magnitudes lie inside when ``calibrate`` is percentile; ema averages the largest magnitudes of the samples, each weighing
    ``momentum`` of the one after it. ``only``: roles of layers whose inputs are rounded; none: all.
    """

    bits: int = 8
    per: Literal["token", "tensor"] = "token"
    calibrate: Calibrate = "absmax"
    percent: float = 99.99
    momentum: float = 0.95
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 … 8, not {self.bits}")
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be in (0, 100], not {self.percent:g}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum:g}")


def round_input(x: Tensor, bits: int, scale: float | None = None) -> Tensor:
    """``x: (…, in)`` on symmetric codes −2^(b−1) … 2^(b−1) − 1, simulated.

    ``scale`` None: ``s = 2 max|x| / (2^b − 1)`` of each token. The arithmetic is compressed-tensors' (every code is used,
    the largest magnitude lies half a step beyond the last one), so that its engines give the same numbers. Raises :class:`NumericalError` for NaN and Inf.
    """
    half = 2.0 ** (bits - 1)
    if scale is None:
        s = x.abs().amax(-1, keepdim=True) / ((2.0**bits - 1) / 2)
        if not bool(torch.isfinite(s).all()):
            raise NumericalError(
                "an activation is not finite: no scale can hold it; the checkpoint overflows on this text"
            )
        s = torch.where(s == 0, torch.full_like(s, torch.finfo(s.dtype).eps), s)
    else:
        s = torch.tensor(scale, dtype=x.dtype)
    return torch.round((x / s).clamp(-half, half - 1)) * s


def static_scale(x: Tensor, tops: Tensor, config: Activations) -> float:
    """The constant scale for activations like ``x`` (any shape), by ``config.calibrate``; half-precision exact.

    ``tops``: the largest magnitude of each calibration sample, in order; ``x`` may be a part of them only.
    """
    if config.calibrate in ("minmax", "absmax"):
        top = float(tops.max())
    elif config.calibrate == "ema":
        moving = ranges.Moving(momentum=config.momentum)
        for one in tops:
            moving = moving.update(one.reshape(1, 1))
        assert moving.high is not None
        top = float(moving.high)
    else:
        grid = ActivationGrid(config.bits, True, "tensor", False, config.calibrate, config.percent)
        low, high = grid.range(torch.cat([x.flatten(), tops.max()[None]])[None].float())
        top = float(torch.maximum(-low, high))
    scale = torch.tensor(top / ((2.0**config.bits - 1) / 2)).half().float()
    if not bool(torch.isfinite(scale)):
        raise NumericalError(f"activations up to {top:g} have no finite half-precision scale; use per: token")
    return float(scale) or 1.0
