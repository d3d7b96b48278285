"""Packed matrices for the C++ kernels: which form a layer gets, what it costs, and the product with it.

Packing happens at load, from neutral arrays; files never hold these layouts. The rules of :func:`choose`
come from measurements on a two-core AVX2 machine (benchmarks/RUNTIME.md):

- dense tiles unless the zeros pay for their positions: N:16 needs 8·N/16 bits a weight, dense int4 needs 4;
- rows that keep unequally are sorted by what they need, and every strip of 16 rows takes its own N;
- masks without structure get N slots for each 16 inputs and a list of what spills over, which pays from
  about 80% zeros. The form is never slower than dense: where it would be, the zeros are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FormatError
from ..core.grid import Codes
from . import reference
from .native import extension

KINDS = {"int2": 2, "int3": 3, "int4": 4, "int6": 6, "int8": 8, "n:16 int4": 104, "n:16 int8": 108, "2:4 int4": 124}
_SPILL_COST = 24.0  # time of one spilled weight in slots
_DENSE_COST = 0.54  # time of one weight of a dense int4 tile in slots


@dataclass(frozen=True)
class Form:
    """How a layer is packed: ``kind`` of :data:`KINDS`, ``slots`` of 16 inputs (0 with "n:16 int4": what each strip of 16 rows
    with alike needs takes), and whether weights may spill."""

    kind: str
    slots: int = 0
    spill: bool = False

    def __str__(self) -> str:
        return self.kind.replace("n:16", f"{self.slots}:16" if self.slots else "N:16 by row") + (
            " + spill" if self.spill else ""
        )


def tile_columns(codes: Codes) -> int:
    """Columns that share a weight scale and an activation scale in the kernels: 32, 64 or 128."""
    columns, group = codes.values.shape[1], codes.group_size
    if group >= columns:
        group = 64 if columns % 128 else 128
    for G in (128, 64, 32):
        if group % G == 0 and (G < 128 or columns % 128 == 0):
            return G
    raise FormatError(f"the runtime needs a group_size that is a multiple of 32 or whole rows, not {codes.group_size}")


def choose(codes: Codes, mask: Tensor | None) -> Form:
    """The fastest form of ``codes`` under ``mask`` (out, in), True = kept."""
    dense = Form(next(f"int{b}" for b in (2, 3, 4, 6, 8) if b >= codes.bits))
    if mask is None:
        return dense
    rows, columns = mask.shape
    kept = torch.zeros(rows, -(-columns // 16) * 16, dtype=torch.int32)
    kept[:, :columns] = mask
    counts = kept.reshape(-1, 16).sum(1)
    most = int(counts.max())
    if codes.bits > 4:
        slots = max(4, -(-most // 4) * 4)
        return Form("n:16 int8", slots) if slots <= 8 else dense
    best, cost = dense, 16 * _DENSE_COST * (1 if codes.bits == 4 else codes.bits / 4)
    for slots in range(2, 8, 2):
        over = float((counts - slots).clamp_min(0).float().mean())
        here = slots + _SPILL_COST * over
        if here < cost:
            best, cost = Form("n:16 int4", slots, most > slots), here
    need = counts.reshape(rows, -1).amax(1).sort(descending=True).values[::16]  # of the strips of rows sorted by it
    here = float(((need + 1) // 2 * 2).clamp_min(2).float().mean())
    if here < min(cost, 7):
        best = Form("n:16 int4")
    if best == dense and codes.bits == 4 and int(kept.reshape(-1, 4).sum(1).max()) <= 2:
        return Form("2:4 int4", 8)
    return best


class Packed:
    """One linear layer ``(rows, columns)`` ready to multiply.

    With the C++ extension the weights live only in packed form; without it the codes are kept and the
    torch reference computes the same function.
    """

    def __init__(self, codes: Codes, mask: Tensor | None = None, form: Form | None = None):
        self.rows, self.columns = codes.values.shape
        self.form = form or choose(codes, mask)
        self.tile = tile_columns(codes)
        self.matrix: Any = None
        self._codes, self._mask = codes, mask
        if extension is None:
            return
        keep = None if mask is None else mask.to(torch.uint8).contiguous().numpy()
        arrays = [t.detach().to(torch.float32).contiguous().numpy() for t in (codes.scale, codes.zero)]
        kind, form = KINDS[self.form.kind], self.form
        try:
            self.matrix = extension.Matrix.pack(
                kind,
                codes.values.contiguous().numpy(),
                *arrays,
                keep,
                codes.group_size,
                self.tile,
                form.slots,
                form.spill,
            )
        except ValueError as error:
            raise FormatError(f"cannot pack a {self.rows} × {self.columns} matrix as {form}: {error}") from error
        del self._codes, self._mask

    @property
    def bytes(self) -> int:
        """Bytes that one product reads (the codes as stored when there is no extension)."""
        return self.matrix.bytes if self.matrix is not None else self._codes.values.numel()

    def decode(self) -> Tensor:
        """The weights, fp32 (rows, columns)."""
        if self.matrix is None:
            w = self._codes.decode()
            return w if self._mask is None else w * self._mask
        out = torch.empty(self.rows, self.columns)
        self.matrix.decode(out.numpy())
        return out

    def linear(self, x: Tensor, threads: int = 1, isa: str = "") -> Tensor:
        """``x Wᵀ`` (tokens, rows) for ``x`` (tokens, columns). ``isa``: "" = the best of this CPU, or "portable"."""
        if x.ndim != 2 or x.shape[1] != self.columns:
            raise ValueError(f"input of shape {tuple(x.shape)} does not fit a layer with {self.columns} columns")
        if self.matrix is None:
            return reference.linear(self._codes, self._mask, x, self.tile)
        y = torch.empty(x.shape[0], self.rows)
        self.matrix.linear(x.detach().float().contiguous().numpy(), y.numpy(), threads, isa)
        return y


class PackedBinary:
    """Binary-coded weights ``offset + Σ_b alpha_b · ±1`` multiplied by table look-up (LUT-GEMM, 2206.09557).

    ``signs`` bool (bits, out, in), ``alpha`` (bits, out, groups), ``offset`` (out, groups); columns in groups
    of ``group_size``, both multiples of 32.
    """

    def __init__(self, signs: Tensor, alpha: Tensor, offset: Tensor, group_size: int):
        self.rows, self.columns = signs.shape[1:]
        fits = [G for G in (128, 64, 32) if self.columns % G == 0 and group_size % G == 0]
        if not fits:
            raise FormatError(
                f"binary-coded layers need columns and groups of 32 · k, not {self.columns}, {group_size}"
            )
        self.tile = fits[0]
        self._arrays = (signs, alpha, offset, group_size)
        self.matrix: Any = None
        if extension is not None:
            values = [t.detach().float().contiguous().numpy() for t in (alpha, offset)]
            bits = signs.to(torch.uint8).contiguous().numpy()
            self.matrix = extension.Bcq.pack(bits, *values, group_size, self.tile)
            del self._arrays

    @property
    def bytes(self) -> int:
        """Bytes that one product reads (of the signs, when there is no extension)."""
        return self.matrix.bytes if self.matrix is not None else self._arrays[0].numel() // 8

    def linear(self, x: Tensor, threads: int = 1, isa: str = "") -> Tensor:
        """``x Wᵀ``, (tokens, out)."""
        if self.matrix is None:
            return reference.binary_linear(*self._arrays, x, self.tile)
        y = torch.empty(x.shape[0], self.rows)
        self.matrix.linear(x.detach().float().contiguous().numpy(), y.numpy(), threads, isa)
        return y
