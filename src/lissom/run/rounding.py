"""Rounding at load, to learn the speed of a form before spending hours on its quality."""

from __future__ import annotations

from torch import Tensor

from ..core import NM, Codes, Grid, LissomError
from .load import Compress


def rounding(name: str) -> Compress:
    """Round to nearest at load: "int4", "int2" … or "4:16 int4".

    Groups of 64 inputs; N:M keeps the largest magnitudes. For speed only: the quality is that of no calibration.
    """
    pattern, _, kind = name.rpartition(" ")
    if kind not in ("int2", "int3", "int4", "int8"):
        raise LissomError(f"unknown rounding {name!r}: use int2, int3, int4 or int8, or N:M before it (4:16 int4)")
    bits = int(kind[3:])
    nm = NM(*map(int, pattern.split(":"))) if pattern else None

    def compress(_: str, weight: Tensor) -> tuple[Codes, Tensor | None]:
        columns = weight.shape[1]
        group = 64 if columns % 64 == 0 else 32 if columns % 32 == 0 else columns
        mask = nm.select(weight.abs()) if nm else None
        weight = weight if mask is None else weight * mask
        params = Grid(bits, group, symmetric=True).fit_all(weight)
        return Codes.round(weight, params, bits, group), mask

    return compress
