"""Uniform quantization grids and the codes that they make.

A grid maps real weights ``W: (out, in)`` to integers ``0 … 2^bits − 1`` with a scale and an integer
zero point for each group of ``group_size`` inputs of a row (``group_size=None``: the whole row).
``decode`` is ``(code − zero) · scale`` in fp32, and the scale is rounded to half precision *before*
rounding weights, so what is stored decodes to exactly what the solver saw. Zero is always a level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .errors import NumericalError
from .parts import Numbers, WeightCodes, ZeroPoints

Range = Literal["minmax", "mse"]

# GPTQ's search: shrink the range in steps of 1% down to 20%, error norm 2.4 (IST-DASLab/gptq quant.py).
_MSE_STEPS, _MSE_MAX_SHRINK, _MSE_NORM = 100, 0.8, 2.4


@dataclass(frozen=True)
class GridParams:
    """Scale and zero point of some rows: both broadcastable to (rows, columns)."""

    scale: Tensor
    zero: Tensor
    levels: Tensor  # 2^bits, per row: rows of one stacked sweep may have different bits

    @property
    def bits(self) -> int:
        """The largest number of bits of any row."""
        return int(self.levels.max()).bit_length() - 1

    def rows(self, rows: slice) -> GridParams:
        """The parameters of some rows."""
        return GridParams(self.scale[rows], self.zero[rows], self.levels[rows])

    def round(self, w: Tensor) -> Tensor:
        """Codes (float, integral) nearest to ``w``."""
        return torch.minimum(torch.round(w / self.scale) + self.zero, self.levels - 1).clamp_min(0)

    def decode(self, code: Tensor) -> Tensor:
        return (code - self.zero) * self.scale

    def project(self, w: Tensor) -> Tensor:
        return self.decode(self.round(w))


@dataclass(frozen=True)
class Grid:
    """A family of uniform grids; :meth:`fit` finds scale and zero point for given weights.

    ``bits`` 2–8. ``group_size`` inputs share a scale, None = one scale for each output row.
    Symmetric: ``scale = max|w| / (2^(bits−1) − 1)``, zero point fixed at ``2^(bits−1)``.
    Asymmetric: min-max with ``min ≤ 0 ≤ max`` forced, so that zero is exact (methods/02 §0.1).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    range: Range = "minmax"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 … 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, not {self.group_size}")

    def fit(self, w: Tensor) -> GridParams:
        """Parameters for ``w: (rows, columns)``, one group a row; returned tensors are (rows, 1)."""
        low, high = w.amin(1, keepdim=True).clamp_max(0), w.amax(1, keepdim=True).clamp_min(0)
        params = self._params(low, high)
        if self.range == "minmax":
            return params
        best, error = params, (params.project(w) - w).abs().pow(_MSE_NORM).sum(1, keepdim=True)
        for step in range(1, int(_MSE_MAX_SHRINK * _MSE_STEPS)):
            shrink = 1 - step / _MSE_STEPS
            trial = self._params(low * shrink, high * shrink)
            loss = (trial.project(w) - w).abs().pow(_MSE_NORM).sum(1, keepdim=True)
            better = loss < error
            error = torch.where(better, loss, error)
            best = replace(
                best,
                scale=torch.where(better, trial.scale, best.scale),
                zero=torch.where(better, trial.zero, best.zero),
            )
        return best

    def _params(self, low: Tensor, high: Tensor) -> GridParams:
        top = float(2**self.bits - 1)
        if self.symmetric:
            half = float(2 ** (self.bits - 1))
            scale = torch.maximum(-low, high) / (half - 1)
        else:
            scale = (high - low) / top
        scale = _half_up(scale)
        if not bool(torch.isfinite(scale).all()):
            raise NumericalError(
                "a quantization scale overflows half precision (weights above 65504 × levels or not finite); "
                "exclude the layer with `ignore`"
            )
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # an all-zero group
        zero = torch.full_like(scale, half) if self.symmetric else torch.round(-low / scale).clamp(0, top)
        return GridParams(scale, zero, torch.full_like(scale, top + 1))

    def fit_all(self, w: Tensor) -> GridParams:
        """Parameters of every group: tensors of shape (rows, groups). The last group may be shorter."""
        rows, columns = w.shape
        size = min(self.group_size or columns, columns)
        whole = columns // size * size
        fits = [self.fit(w[:, :whole].reshape(-1, size))]
        parts = [[t.reshape(rows, -1) for t in (fits[0].scale, fits[0].zero, fits[0].levels)]]
        if whole < columns:
            tail = self.fit(w[:, whole:])
            parts.append([tail.scale, tail.zero, tail.levels])
        return GridParams(*(torch.cat(ts, 1) for ts in zip(*parts, strict=True)))

    def project(self, w: Tensor) -> Tensor:
        """Round to nearest on the grid fitted to ``w`` itself."""
        return Codes.round(w, self.fit_all(w), self.bits, self.group_size).decode()


def _half_up(scale: Tensor) -> Tensor:
    """The smallest half-precision numbers that are not below ``scale ≥ 0``, as fp32: a range never shrinks."""
    half = scale.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)  # positive halves are ordered like their bits
    return torch.where(half.float() < scale, above, half).float()


def spread_groups(t: Tensor, columns: int, group_size: int) -> Tensor:
    """(rows, groups) → (rows, columns): each group's value at every column of the group."""
    return t.repeat_interleave(group_size, 1)[:, :columns]


@dataclass(frozen=True)
class Codes:
    """What is stored: ``values`` uint8 (out, in), ``scale`` fp16-exact fp32 and ``zero`` (out, groups).

    Group g holds the columns ``g · group_size … (g + 1) · group_size − 1``; the last one may be shorter.
    """

    values: WeightCodes
    scale: Numbers
    zero: ZeroPoints
    bits: int
    group_size: int

    @property
    def symmetric(self) -> bool:
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    @classmethod
    def round(cls, w: Tensor, params: GridParams, bits: int, group_size: int | None = None) -> Codes:
        """Codes nearest to ``w`` under parameters of shape (out, groups); ``group_size`` None: whole rows."""
        columns = w.shape[1]
        size = min(group_size or columns, columns)
        wide = GridParams(*(spread_groups(t, columns, size) for t in (params.scale, params.zero, params.levels)))
        return cls(wide.round(w).to(torch.uint8), params.scale, params.zero, bits, size)

    def decode(self) -> Tensor:
        """The weights, fp32 (out, in)."""
        columns = self.values.shape[1]
        zero, scale = (spread_groups(t, columns, self.group_size) for t in (self.zero, self.scale))
        return (self.values.float() - zero) * scale

    def rows(self, start: int, stop: int) -> Codes:
        return replace(self, values=self.values[start:stop], scale=self.scale[start:stop], zero=self.zero[start:stop])
