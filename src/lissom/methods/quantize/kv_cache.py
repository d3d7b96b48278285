"""Quantized keys and values: 8, 4 or 2 bits, per token or per channel, static or dynamic.

    token     one asymmetric grid per token, head and group of ``group`` neighbouring channels     (values)
    channel   one per channel, head and group of ``group`` neighbouring tokens                     (keys)

Keys have a few large channels, which a per-token grid would let drown all others; values have none (KIVI, Liu et al.
2024, arXiv 2402.02750). ``recent`` tokens at the end stay in full precision: a channel's group is closed only when
``group`` tokens are there. x: (batch, heads, tokens, size). Scales are fp16-exact.
Static grids come from :func:`calibrate_channels`: one per head and channel, for any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import ranges
from .common import half


@dataclass(frozen=True)
class CacheGrid:
    """``bits`` 2–8; ``per`` token | channel; ``group`` entries share a grid; ``recent`` tokens are left alone."""

    bits: int = 4
    per: Literal["token", "channel"] = "token"
    group: int = 64
    recent: int = 0

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
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.round((x - low) / scale).clamp(0, 2**bits - 1)
    return CacheCodes(values.to(torch.uint8), scale, low)


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
        pieces.append(encode_groups(flat, config.bits).decode().reshape(piece.shape))
    done = torch.cat(pieces, 3)
    done = done if config.per == "token" else done.transpose(2, 3)
    return torch.cat([done, x[:, :, old:]], 2)


def calibrate_channels(x: Tensor, bits: int, percent: float = 100.0) -> tuple[Tensor, Tensor]:
    """Static scale and zero point, (heads, 1, size), from calibration keys or values (batch, heads, tokens, size)."""
    heads, size = x.shape[1], x.shape[3]
    flat = x.permute(1, 3, 0, 2).reshape(heads * size, -1)
    low, high = ranges.minmax(flat)
    if percent < 100:
        limit = ranges.percentile(flat, percent)[1]
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scale, zero = ranges.grid(low, high, bits)
    return scale.reshape(heads, 1, size), zero.reshape(heads, 1, size)


def fake_cache_static(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The same with constant grids."""
    return ranges.fake(x, scale, zero, bits)


def cache_bits(config: CacheGrid) -> float:
    """Bits per stored number, scale and low end included."""
    return config.bits + 32 / config.group
