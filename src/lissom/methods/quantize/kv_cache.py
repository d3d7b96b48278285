"""Quantized keys and values: 8, 4 or 2 bits, per token or per channel, static or dynamic.

    token     one asymmetric grid per token, head and group of ``group`` neighbouring channels     (values)
    channel   one per channel, head and group of ``group`` neighbouring tokens                     (keys)

Keys have a few large channels, which a per-token grid would let drown all others; values have none (KIVI, Liu et al.
2024, arXiv 2402.02750). ``recent`` tokens at the end stay in full precision: a channel's group is closed only when
``group`` tokens are there. x: (batch, heads, tokens, size). Scales are fp16-exact.
Static grids (:func:`calibrate_static`) hold for any token: one per head and channel (channel), or per head and ``group``
channels (token), with zero among the levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import NumericalError
from . import ranges
from .common import half


@dataclass(frozen=True)
class CacheGrid:
    """``bits`` 2–8; ``per`` token | channel; ``group`` entries share a grid; ``recent`` tokens are left alone.

    ``zero``: low – a half-precision low end; integer – a zero point, as compressed-tensors computes (fp32 scales).
    ``static``: ranges are constants from calibration, zero points integers, and no group of tokens waits to be full.
    """

    bits: int = 4
    per: Literal["token", "channel"] = "token"
    group: int = 64
    recent: int = 0
    zero: Literal["low", "integer"] = "low"
    static: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 … 8, not {self.bits}")


@dataclass(frozen=True)
class CacheCodes:
    """``values`` uint8 (groups, n) with ``scale``, ``low`` (groups, 1): x ≈ values · scale + low."""

    values: Tensor
    scale: Tensor
    low: Tensor

    def decode(self) -> Tensor:
        return self.values.float() * self.scale + self.low


def encode_groups(x: Tensor, bits: int) -> CacheCodes:
    """Min-max codes of ``x: (groups, n)``; the low end need not be a multiple of the scale."""
    low = half(x.amin(1, keepdim=True))
    scale = half((x.amax(1, keepdim=True) - low) / (2**bits - 1))
    if not bool((torch.isfinite(low) & torch.isfinite(scale)).all()):
        raise NumericalError(
            "keys or values beyond half precision cannot be cached with `zero: low`; use zero: integer"
        )
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.round((x - low) / scale).clamp(0, 2**bits - 1)
    return CacheCodes(values.to(torch.uint8), scale, low)


def fake_integer(x: Tensor, bits: int) -> Tensor:
    """``x: (groups, n)`` on grids with min ≤ 0 ≤ max and an integer zero point, every step as compressed-tensors does it."""
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    half = 2.0 ** (bits - 1)
    scale = (high - low) / (2.0**bits - 1)
    zero = torch.round((-half - low / scale).clamp(-half, half - 1).nan_to_num(0.0))
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    return (torch.round((x / scale + zero).clamp(-half, half - 1)) - zero) * scale


def fake_cache(x: Tensor, config: CacheGrid) -> Tensor:
    """What an attention step reads back, dynamic grids: shape of x. A short last group has a grid of its own."""
    tokens = x.shape[2]
    old = tokens - config.recent
    if config.per == "channel":  # only whole groups are closed
        old = old // config.group * config.group
    if old <= 0:
        return x
    part = x[:, :, :old]
    view = part if config.per == "token" else part.transpose(2, 3)
    pieces = []
    for piece in view.split(config.group, 3):
        flat = piece.reshape(-1, piece.shape[3])
        done = (
            fake_integer(flat, config.bits) if config.zero == "integer" else encode_groups(flat, config.bits).decode()
        )
        pieces.append(done.reshape(piece.shape))
    done = torch.cat(pieces, 3)
    done = done if config.per == "token" else done.transpose(2, 3)
    return torch.cat([done, x[:, :, old:]], 2)


def calibrate_static(x: Tensor, config: CacheGrid, percent: float = 100.0) -> tuple[Tensor, Tensor]:
    """Scale (fp16-exact) and zero point, (heads, 1, size), from calibration keys or values (batch, heads, tokens, size).

    ``percent`` of the magnitudes of each grid lie inside.
    """
    heads, size = x.shape[1], x.shape[3]
    together = 1 if config.per == "channel" else min(config.group, size)
    flat = x.permute(1, 3, 0, 2).reshape(heads * size // together, -1)
    low, high = ranges.minmax(flat)
    if percent < 100:
        limit = ranges.percentile(flat, percent)[1]
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scale, _ = ranges.grid(low, high, config.bits)
    scale = half(scale)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise NumericalError("keys or values have no half-precision scale; use static: false with zero: integer")
    zero = torch.round(-low / scale).clamp(0, 2**config.bits - 1)
    return tuple(t.repeat_interleave(together, 0).reshape(heads, 1, size) for t in (scale, zero))  # type: ignore[return-value]


def fake_cache_static(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The same with constant grids."""
    return ranges.fake(x, scale, zero, bits)


def cache_bits(config: CacheGrid) -> float:
    """Bits per stored number, scale and low end included; static grids are no part of the cache."""
    return config.bits + (0 if config.static else 32 / config.group)


@dataclass(frozen=True)
class KVCache:
    """A step: keys and values are rounded when they are written.

    ``bits`` 2 … 8 of both unless ``key_bits`` or ``value_bits`` says otherwise. ``keys``, ``values``: token | channel.
    ``group_size`` channels (token) or tokens (channel) share a grid. The last ``recent`` tokens stay in full precision, and
    so does a channel's group that is not full. ``zero`` as of :class:`CacheGrid`. ``rotate``: turn queries and keys by a
    Hadamard matrix first (QuaRot's R3; products are unchanged), an operator of the run. ``static``: ranges from the calibration
    text on the model as it is before it is solved, ``percent`` of the magnitudes inside; false: of what is in the cache.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    keys: Literal["token", "channel"] = "channel"
    values: Literal["token", "channel"] = "token"
    group_size: int = 64
    recent: int = 0
    zero: Literal["low", "integer"] = "low"
    rotate: bool = False
    static: bool = False
    percent: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be in (0, 100], not {self.percent:g}")
        if self.group_size < 1 or self.recent < 0:
            raise ValueError(f"group_size ≥ 1 and recent ≥ 0 are needed, not {self.group_size} and {self.recent}")
        self.grids()

    def grids(self) -> tuple[CacheGrid, CacheGrid]:
        """Of keys and of values."""
        bits = (self.key_bits or self.bits, self.value_bits or self.bits)
        return (
            CacheGrid(bits[0], self.keys, self.group_size, self.recent, self.zero, self.static),
            CacheGrid(bits[1], self.values, self.group_size, self.recent, self.zero, self.static),
        )


def in_full_precision(tokens: int, config: CacheGrid) -> Tensor | None:
    """(tokens, tokens) bool: whether the query of a row reads a key's token before it is rounded; None: never.

    A channel's group is rounded when it is full, that is for queries of later groups; ``recent`` counts the query's own
    token, and whole groups of channels wait until all of it is older.
    """
    at = torch.arange(tokens)
    if config.per == "token" or config.static:
        return (at[:, None] - at < config.recent) if config.recent else None
    groups = at // config.group
    return at[:, None] - (groups * config.group + config.group - 1) < max(config.recent, 1)
