"""What is stored when a uniform integer grid (:class:`Codes`) is not the whole story.

Every form is frozen data with ``decode() -> (out, in) fp32``, the weights bit for bit as the solver returned them;
``rows(start, stop)``, the same for some rows; and ``size``, the bits that a file needs for it. Forms nest:
``Scaled(Codes)`` is AWQ, ``Rotated(Affine)`` QuIP, ``Patched(TwoLevel)`` SpQR, ``LowRank(Levels)`` LoftQ.

Where decoding mixes rows (a product of matrices) a slice would not round as the whole does, so solvers treat the
layers of a stack one by one and return :class:`Stacked`, whose ``rows`` gives back exactly one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from .grid import Codes, spread_groups
from .parts import (
    BlockScales,
    Indices,
    Integers,
    KeepMask,
    Mixes,
    Numbers,
    RowNumbers,
    SparseNumbers,
    WeightCodes,
    WeightSigns,
)
from .rotation import Rotation


@runtime_checkable
class Stored(Protocol):
    """The interface of all forms; :class:`Codes` has it too, except for ``size`` (:func:`stored_bits`)."""

    def decode(self) -> Tensor: ...

    def rows(self, start: int, stop: int) -> Stored: ...


def stored_bits(form: Stored) -> int:
    """Bits in a file: codes without padding, scales and offsets at their stored width, indices at 16+16."""
    if isinstance(form, Codes):
        groups = form.scale.numel()
        return form.values.numel() * form.bits + groups * (16 if form.symmetric else 16 + form.bits)
    return form.size  # type: ignore[attr-defined]


def grid_of(form: Stored | None) -> tuple[int, int | None] | None:
    """Bits of a code and inputs that share a scale, of the codes at the bottom of a form; None where there are none."""
    if isinstance(form, Binary):
        return len(form.signs), form.group_size
    if form is None or hasattr(form, "bits"):
        return None if form is None else (form.bits, form.group_size)  # type: ignore[attr-defined]
    return grid_of(getattr(form, "base", None))


@dataclass(frozen=True)
class Plain:
    """Half-precision weights, zeros left out behind a bitmap where there are any: ``weight`` fp32 (out, in), fp16-exact."""

    weight: SparseNumbers

    def decode(self) -> Tensor:
        return self.weight

    def rows(self, start: int, stop: int) -> Plain:
        return Plain(self.weight[start:stop])

    @property
    def size(self) -> int:
        kept = int((self.weight != 0).sum())
        return 16 * kept + (self.weight.numel() if kept < self.weight.numel() else 0)


@dataclass(frozen=True)
class Affine:
    """``w = code · scale + offset``: ``values`` uint8 (out, in); ``scale``, ``offset`` (out, groups), fp16-exact.

    Zero need not be a level (a float zero point). The layout of GGUF's Q4_1 when groups hold 32 inputs.
    """

    values: WeightCodes
    scale: Numbers
    offset: Numbers
    bits: int
    group_size: int

    def decode(self) -> Tensor:
        scale, offset = (spread_groups(t, self.values.shape[1], self.group_size) for t in (self.scale, self.offset))
        return self.values.float() * scale + offset

    def rows(self, start: int, stop: int) -> Affine:
        s = slice(start, stop)
        return replace(self, values=self.values[s], scale=self.scale[s], offset=self.offset[s])

    @property
    def size(self) -> int:
        return self.values.numel() * self.bits + 16 * (self.scale.numel() + self.offset.numel())


@dataclass(frozen=True)
class Levels:
    """``w = table[code] · scale``, a codebook.

    ``values`` uint8 (out, in). ``table`` (1, levels) for all rows or (out, levels). ``scale`` (out, groups) fp32,
    exactly ``block scale · tensor_scale`` with the block scale in ``scale_format``: float16, e8m0 (power of two) or
    e4m3. ``name``: the kind of table, e.g. nf4 or kmeans; ``custom``: whether the file must hold the table.
    """

    values: WeightCodes
    table: Numbers
    scale: BlockScales
    group_size: int
    name: str
    scale_format: str = "float16"
    tensor_scale: float = 1.0
    custom: bool = False

    @property
    def bits(self) -> int:
        return (self.table.shape[1] - 1).bit_length()

    def decode(self) -> Tensor:
        index = self.values.long()
        w = self.table[0][index] if len(self.table) == 1 else self.table.gather(1, index)
        return w * spread_groups(self.scale, w.shape[1], self.group_size)

    def rows(self, start: int, stop: int) -> Levels:
        s = slice(start, stop)
        table = self.table if len(self.table) == 1 else self.table[s]
        return replace(self, values=self.values[s], scale=self.scale[s], table=table)

    @property
    def size(self) -> int:
        width = 0 if not bool((self.scale != 1).any()) else 16 if self.scale_format == "float16" else 8
        table = 16 * self.table.numel() if self.custom else 0
        tensor_scale = 32 if self.tensor_scale != 1.0 else 0
        return self.values.numel() * self.bits + width * self.scale.numel() + table + tensor_scale


@dataclass(frozen=True)
class Binary:
    """Binary-coded: ``w = Σ_i alpha_i · b_i + offset``, b_i ∈ {−1, +1}.

    ``signs`` bool (planes, out, in), True = +1; ``alpha`` (planes, out, groups); ``offset`` (out, groups), fp16-exact.
    """

    signs: WeightSigns
    alpha: Numbers
    offset: Numbers
    group_size: int

    def decode(self) -> Tensor:
        columns = self.signs.shape[2]
        w = spread_groups(self.offset, columns, self.group_size)
        for b, a in zip(self.signs, self.alpha, strict=True):
            a = spread_groups(a, columns, self.group_size)
            w = w + torch.where(b, a, -a)
        return w

    def rows(self, start: int, stop: int) -> Binary:
        s = slice(start, stop)
        return replace(self, signs=self.signs[:, s], alpha=self.alpha[:, s], offset=self.offset[s])

    @property
    def size(self) -> int:
        return self.signs.numel() + 16 * (self.alpha.numel() + self.offset.numel())


@dataclass(frozen=True)
class Second:
    """Scales or zero points that are themselves integers: ``code · step + base``, (out, groups).

    ``codes`` uint8 (out, groups); ``step``, ``base`` (out, ⌈groups / size⌉), fp16-exact.
    """

    codes: Integers
    step: Numbers
    base: Numbers
    bits: int
    group: int

    def decode(self) -> Tensor:
        columns = self.codes.shape[1]
        step, base = (spread_groups(t, columns, self.group) for t in (self.step, self.base))
        return self.codes.float() * step + base

    def rows(self, start: int, stop: int) -> Second:
        s = slice(start, stop)
        return replace(self, codes=self.codes[s], step=self.step[s], base=self.base[s])

    @property
    def size(self) -> int:
        bases = self.base.numel() if bool((self.base != 0).any()) else 0
        return self.codes.numel() * self.bits + 16 * (self.step.numel() + bases)


@dataclass(frozen=True)
class TwoLevel:
    """``w = (code − zero) · scale`` with quantized scales, and quantized zero points or one constant."""

    values: WeightCodes
    scale: Second
    zero: Second | float
    bits: int
    group_size: int

    def decode(self) -> Tensor:
        columns = self.values.shape[1]
        scale = spread_groups(self.scale.decode(), columns, self.group_size)
        zero = self.zero
        if isinstance(zero, Second):
            zero = spread_groups(zero.decode(), columns, self.group_size)
        return (self.values.float() - zero) * scale

    def rows(self, start: int, stop: int) -> TwoLevel:
        zero = self.zero.rows(start, stop) if isinstance(self.zero, Second) else self.zero
        return replace(self, values=self.values[start:stop], scale=self.scale.rows(start, stop), zero=zero)

    @property
    def size(self) -> int:
        zero = self.zero.size if isinstance(self.zero, Second) else 0
        return self.values.numel() * self.bits + self.scale.size + zero


@dataclass(frozen=True)
class Patched:
    """``base`` with single weights replaced: ``row``, ``column``, ``value`` (count,), sorted by row, fp16-exact."""

    base: Stored
    row: RowNumbers
    column: Indices
    value: Numbers

    @classmethod
    def where(cls, base: Stored, chosen: Tensor, weights: Tensor) -> Patched:
        """Replace the entries where ``chosen`` (out, in) by ``weights``, rounded to half precision."""
        row, column = chosen.nonzero(as_tuple=True)
        return cls(base, row, column, weights[row, column].half().float())

    def decode(self) -> Tensor:
        w = self.base.decode()
        w[self.row, self.column] = self.value
        return w

    def rows(self, start: int, stop: int) -> Patched:
        inside = (self.row >= start) & (self.row < stop)
        row, column, value = self.row[inside] - start, self.column[inside], self.value[inside]
        return Patched(self.base.rows(start, stop), row, column, value)

    @property
    def size(self) -> int:
        return stored_bits(self.base) + 32 * self.value.numel()  # 16-bit column, 16-bit value; row offsets are few


@dataclass(frozen=True)
class Columns:
    """``base`` with whole inputs replaced: ``index`` (count,) rising, ``value`` (out, count), fp16-exact."""

    base: Stored
    index: Indices
    value: Numbers

    def decode(self) -> Tensor:
        w = self.base.decode()
        w[:, self.index] = self.value
        return w

    def rows(self, start: int, stop: int) -> Columns:
        return Columns(self.base.rows(start, stop), self.index, self.value[start:stop])

    @property
    def size(self) -> int:
        """The codes that are replaced are counted too: removing them is the file's choice."""
        return stored_bits(self.base) + 16 * self.value.numel() + 16 * self.index.numel()


@dataclass(frozen=True)
class Masked:
    """``base`` with exact zeros where ``mask`` (out, in) bool is False: for forms that have no level at zero."""

    base: Stored
    mask: KeepMask

    def decode(self) -> Tensor:
        return torch.where(self.mask, self.base.decode(), 0.0)

    def rows(self, start: int, stop: int) -> Masked:
        return Masked(self.base.rows(start, stop), self.mask[start:stop])

    @property
    def size(self) -> int:
        return stored_bits(self.base) + self.mask.numel()


@dataclass(frozen=True)
class Scaled:
    """``base · factor`` with one ``factor`` per input, (in,): exact to fold into whatever makes the input."""

    base: Stored
    factor: Numbers

    def decode(self) -> Tensor:
        return self.base.decode() * self.factor

    def rows(self, start: int, stop: int) -> Scaled:
        return Scaled(self.base.rows(start, stop), self.factor)

    @property
    def size(self) -> int:
        return stored_bits(self.base) + 32 * self.factor.numel()


@dataclass(frozen=True)
class Rotated:
    """``base = Lᵀ W R``, so ``W = L · base · Rᵀ``; at run time ``y = L (base (Rᵀ x))``, with R.apply(x) = Rᵀx.

    ``left`` L (out, out), ``right`` R (in, in), either None. Only the seeds are stored.
    """

    base: Annotated[Stored, Mixes()]
    left: Rotation | None
    right: Rotation | None

    @staticmethod
    def forward(W: Tensor, left: Rotation | None, right: Rotation | None) -> Tensor:
        """``Lᵀ W R``."""
        W = right.apply(W) if right else W
        return left.apply(W.T.contiguous()).T.contiguous() if left else W

    def decode(self) -> Tensor:
        """In double precision, so that the order in which a library sums does not show in fp32."""
        W = self.base.decode().double()
        if self.left:
            W = self.left.undo(W.T.contiguous()).T.contiguous()
        return (self.right.undo(W) if self.right else W).float()

    def rows(self, start: int, stop: int) -> Rotated:
        if (start, stop) != (0, self.left.size if self.left else stop):
            raise ValueError("rows of a rotated layer are mixed and cannot be taken apart")
        return self

    @property
    def size(self) -> int:
        return stored_bits(self.base) + 64


@dataclass(frozen=True)
class LowRank:
    """``base + A Bᵀ``: ``A`` (out, r), ``B`` (in, r), fp16-exact.

    Summed in double precision from contiguous factors, so that neither the layout in memory nor the order of the sum shows in fp32.
    """

    base: Stored
    A: Numbers
    B: Numbers

    def decode(self) -> Tensor:
        product = self.A.double().contiguous() @ self.B.double().contiguous().T
        return (self.base.decode().double() + product).float()

    def rows(self, start: int, stop: int) -> LowRank:
        if (start, stop) != (0, len(self.A)):
            raise ValueError("a product of factors rounds differently in parts: keep the layer whole")
        return self

    @property
    def size(self) -> int:
        return stored_bits(self.base) + 16 * (self.A.numel() + self.B.numel())


@dataclass(frozen=True)
class Stacked:
    """Layers of one stack, each in a form of its own; ``parts`` = ((rows, form), …)."""

    parts: tuple[tuple[int, Stored], ...]

    def decode(self) -> Tensor:
        return torch.cat([form.decode() for _, form in self.parts])

    def rows(self, start: int, stop: int) -> Stored:
        at = 0
        for rows, form in self.parts:
            if (at, at + rows) == (start, stop):
                return form
            at += rows
        raise ValueError(f"rows {start}:{stop} are not one layer of the stack {[rows for rows, _ in self.parts]}")

    @property
    def size(self) -> int:
        return sum(stored_bits(form) for _, form in self.parts)
