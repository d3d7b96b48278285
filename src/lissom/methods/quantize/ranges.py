"""Range calibration: which interval [low, high] a grid covers, and the grid that follows.

Every function takes ``x: (groups, n)``, one grid per row, and returns ``low, high: (groups, 1)`` with low ≤ 0 ≤ high,
so that zero is a level. What a row is (tensor, channel, token, group, block) is :func:`split`'s business.

    minmax       smallest and largest value
    absmax       ± the largest magnitude
    percentile   the given quantile of the magnitudes, ±
    mse          the shrunk min-max interval with the least Σ|x − Q(x)|^2.4 (GPTQ's search: 1, .99, … .21)
    entropy      ± the threshold with the least KL(P‖Q) between the histogram and its 2^(bits−1)-level version
    Moving       exponential moving average of min and max over batches

    affine     s = (high − low)/(2^b − 1),      z = round(−low/s),  codes 0 … 2^b − 1
    symmetric  s = max(−low, high)/(2^(b−1) − 1),   z = 0,          codes ±(2^(b−1) − 1)

Sources: methods/02 §0.1–0.2; the entropy search is TensorRT's (Migacz, GTC 2017), here on exact counts; KL is taken
over the bins inside the threshold with the clipped mass added to the last one, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Per = Literal["tensor", "row", "column", "group", "block"]


def split(x: Tensor, per: Per, size: int = 128) -> Tensor:
    """``x: (a, b)`` as (groups, n), one group a row; :func:`join` is the inverse.

    ``row``: output channel of a weight, token of an activation; ``column``: channel of an activation; ``group``:
    ``size`` neighbours in a row; ``block``: ``size`` × ``size`` tiles. ``size`` must divide.
    """
    a, b = x.shape
    if per == "tensor":
        return x.reshape(1, -1)
    if per == "row":
        return x
    if per == "column":
        return x.T
    if b % size or (per == "block" and a % size):
        raise ValueError(f"{per}s of {size} do not divide a tensor of shape {(a, b)}")
    if per == "group":
        return x.reshape(-1, size)
    return x.reshape(a // size, size, b // size, size).transpose(1, 2).reshape(-1, size * size)


def join(y: Tensor, shape: tuple[int, int], per: Per, size: int = 128) -> Tensor:
    """(groups, n) back to ``shape``."""
    a, b = shape
    if per == "column":
        return y.T
    if per == "block":
        return y.reshape(a // size, b // size, size, size).transpose(1, 2).reshape(a, b)
    return y.reshape(a, b)


def minmax(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)


def absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.abs().amax(1, keepdim=True)
    return -top, top


def percentile(x: Tensor, percent: float = 99.99) -> tuple[Tensor, Tensor]:
    """``percent`` of the magnitudes lie inside; the value is an element of x, not an interpolation."""
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be in (0, 100], not {percent}")
    k = min(x.shape[1], max(1, round(percent / 100 * x.shape[1])))
    top = x.abs().kthvalue(k, dim=1, keepdim=True).values
    return -top, top


def mse(x: Tensor, bits: int, symmetric: bool = False, norm: float = 2.4, steps: int = 80) -> tuple[Tensor, Tensor]:
    low0, high0 = absmax(x) if symmetric else minmax(x)
    low, high, best = low0, high0, torch.full_like(low0, torch.inf)
    for i in range(steps):
        shrink = 1 - i / 100
        trial = fake(x, *grid(low0 * shrink, high0 * shrink, bits, symmetric), bits, symmetric)
        loss = (trial - x).abs().pow(norm).sum(1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        low, high = torch.where(better, low0 * shrink, low), torch.where(better, high0 * shrink, high)
    return low, high


def entropy(x: Tensor, bits: int = 8, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """One threshold per row by the histogram of |x|; ``bins`` > 2^(bits−1)."""
    tops = []
    for row in x.abs().double().cpu().numpy():
        tops.append(_entropy_threshold(row, 2 ** (bits - 1), bins))
    top = x.new_tensor(tops)[:, None]
    return -top, top


def _entropy_threshold(magnitudes: np.ndarray, levels: int, bins: int) -> float:
    top = float(magnitudes.max(initial=0.0))
    if top == 0:
        return 0.0
    counts, _ = np.histogram(magnitudes, bins, (0.0, top))
    best, chosen = np.inf, bins
    for i in range(levels, bins + 1):
        P = counts[:i].astype(float)
        filled = P > 0  # of the histogram itself: the clipped tail must not make room for mass in Q
        bounds = np.linspace(0, i, levels + 1).astype(int)[:-1]
        mass = np.add.reduceat(P, bounds)
        places = np.add.reduceat(filled.astype(float), bounds)
        width = np.diff(np.append(bounds, i))
        Q = np.repeat(mass / np.maximum(places, 1), width) * filled
        P[-1] += counts[i:].sum()
        # a bin that holds only clipped mass has Q = 0; a small count there keeps the divergence finite
        p, q = P / P.sum(), (Q + 1e-4) / (Q + 1e-4).sum()
        divergence = float((p[P > 0] * np.log(p[P > 0] / q[P > 0])).sum())
        if divergence < best:
            best, chosen = divergence, i
    return top if chosen == bins else (chosen + 0.5) * top / bins


@dataclass(frozen=True)
class Moving:
    """Exponential moving average of ranges over batches: ``r ← m r + (1 − m) r_batch``; the first batch starts it."""

    low: Tensor | None = None
    high: Tensor | None = None
    momentum: float = 0.95

    def update(self, x: Tensor) -> Moving:
        low, high = minmax(x)
        if self.low is None or self.high is None:
            return Moving(low, high, self.momentum)
        m = self.momentum
        return Moving(m * self.low + (1 - m) * low, m * self.high + (1 - m) * high, m)


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point, shapes of ``low``. An empty interval gets scale 1."""
    span, steps = (torch.maximum(-low, high), 2 ** (bits - 1) - 1) if symmetric else (high - low, 2**bits - 1)
    scale = span / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(0, 2**bits - 1)
    return scale, zero


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Integer codes as floats: 0 … 2^b − 1, or ±(2^(b−1) − 1) when symmetric."""
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    return (torch.round(x / scale) + zero).clamp(-top if symmetric else 0, top)


def fake(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Quantize and decode, in floats."""
    return (encode(x, scale, zero, bits, symmetric) - zero) * scale
