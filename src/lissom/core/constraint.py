"""What the compressed weights must satisfy: a pattern of zeros, a grid of levels, or both.

``score`` and ``w`` have shape (rows, columns). A pattern's ``select`` returns the weights to *keep*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .grid import Codes, Grid, GridParams

Comparison = Literal["layer", "row"]
_SAMPLE = 1 << 14  # entries that say about where a threshold lies


@runtime_checkable
class Pattern(Protocol):
    """Where zeros must be."""

    @property
    def width(self) -> int:
        """Columns that are decided together: a solver cuts its blocks at multiples of this; 0 is all of them."""
        ...

    @property
    def local(self) -> bool:
        """Whether every ``width`` columns are decided on their own, and not beside the rest of a block."""
        ...

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        """Keep-mask (bool, shape of ``score``) for the columns that start at column ``at``."""
        ...


def _above(score: Tensor, threshold: Tensor) -> Tensor:
    """``score > threshold``; torch writes bools eight times as slowly as numpy."""
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score > threshold
    return torch.from_numpy(score.detach().numpy() > threshold.numpy())


def _smallest(score: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest entry of each row, (rows, 1).

    numpy's partition is vectorised and torch's ``kthvalue`` is not: 1 against 12 ms for a layer of 885k weights, 2 against 14 ms
    for its rows.
    """
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        if len(score) == 1:  # one group of a GPU's threads would do all of a row's kthvalue
            return score.sort(dim=1).values[:, k - 1 : k]
        return score.kthvalue(k, dim=1, keepdim=True).values
    if len(score) == 1 and score.shape[1] >= 4 * _SAMPLE:
        found = _between(score[0], k)
        if found is not None:
            return found[None, None]
    values = score.detach().numpy().copy()
    values.partition(k - 1, axis=1)
    return torch.from_numpy(values[:, k - 1 : k].copy())


def _between(score: Tensor, k: int) -> Tensor | None:
    """The ``k``-th smallest of many entries: a sample says between which two values it lies, the few entries there are parted.

    A quarter of the time of parting them all. None where the sample misleads (deviations of more than four sigma, many ties, NaN).
    """
    values = score.detach().numpy()
    sample = values[:: len(values) // _SAMPLE].copy()
    sample.sort()
    at = k / len(values) * len(sample)
    width = 4 * math.sqrt(at * (1 - k / len(values))) + 2
    low, high = sample[max(0, int(at - width))], sample[min(len(sample) - 1, int(at + width))]
    inside = values >= low
    below = len(values) - int(torch.from_numpy(inside).count_nonzero())
    inside &= values <= high
    middle = values[inside.nonzero()[0]]
    if not below < k <= below + len(middle):
        return None
    middle.partition(k - below - 1)
    return torch.tensor(middle[k - below - 1])


def keep_largest(score: Tensor, drop: int) -> Tensor:
    """Keep-mask that drops exactly ``drop`` entries of each row of ``score``, the smallest ones.

    Ties are broken by position (the first of equals goes), so the count is exact.
    """
    columns = score.shape[1]
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if drop >= columns:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _smallest(score, drop)
    keep = _above(score, threshold)
    if len(score) == 1 and int(keep.count_nonzero()) == columns - drop:  # the usual case without a sum by rows
        return keep
    missing = columns - drop - keep.sum(1, keepdim=True)
    if not bool(missing.any()):
        return keep
    equal = score == threshold
    later = equal.flip(1).cumsum(1).flip(1)  # how many equals stand here or to the right
    return keep | (equal & (later <= missing))


@dataclass(frozen=True)
class Sparse:
    """The fraction ``p`` of zeros, compared over the whole block or per row.

    ``unit``: (rows, columns) of the rectangles that go or stay as a whole, tiled from the first weight; 0 means all of them, so
    (1, 1) is unstructured, (1, 0) removes whole rows, (0, 1) whole columns, (4, 1) and (1, 16) blocks of that shape. A
    unit's score is the sum over its weights; a "row" of comparison is then a band of units.
    """

    p: float
    per: Comparison = "layer"
    unit: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"sparsity must be in [0, 1), not {self.p}")

    local = False

    @property
    def width(self) -> int:
        return self.unit[1]

    def units(self, score: Tensor) -> Tensor:
        """Score of every unit, the sum over its weights: (rows / unit rows, columns / unit columns)."""
        if self.unit == (1, 1):
            return score
        r, c = self._shape(score)
        if score.shape[0] % r or score.shape[1] % c:
            raise ValueError(f"units of {r} × {c} do not divide {tuple(score.shape)}")
        return score.reshape(score.shape[0] // r, r, score.shape[1] // c, c).sum((1, 3))

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        units = self.units(score)
        view = units if self.per == "row" else units.reshape(1, -1)
        keep = keep_largest(view, round(self.p * view.shape[1])).reshape(units.shape)
        if self.unit == (1, 1):
            return keep
        r, c = self._shape(score)
        return keep.repeat_interleave(r, 0).repeat_interleave(c, 1)

    def _shape(self, score: Tensor) -> tuple[int, int]:
        return self.unit[0] or score.shape[0], self.unit[1] or score.shape[1]


@dataclass(frozen=True)
class NM:
    """Semi-structured sparsity: at most ``n`` of every ``m`` consecutive inputs of a row are kept.

    "2:4" keeps two of four. Any 1 ≤ n ≤ m ≤ 32.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= 32:
            raise ValueError(f"N:M needs 1 ≤ N ≤ M ≤ 32, not {self.n}:{self.m}")

    local = True

    @property
    def width(self) -> int:
        return self.m

    @property
    def p(self) -> float:
        return 1 - self.n / self.m

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        if score.shape[1] % self.m:
            raise ValueError(f"{self.n}:{self.m} does not divide {score.shape[1]} columns")
        return keep_largest(score.reshape(-1, self.m), self.m - self.n).reshape(score.shape)


@dataclass(frozen=True)
class NMByRow:
    """Semi-structured sparsity with N chosen for each row: N_r of every ``m`` consecutive inputs of row r, in the mean (1 − p)·m.

    The scores kept are the largest that such rows can keep: the k-th best weights of a row's groups, added up, are what a k-th
    place in each of them is worth; that falls with k, so the best places over all rows are a choice of N_r.
    """

    p: float
    m: int

    def __post_init__(self) -> None:
        if not (0 <= self.p < 1 and 1 <= self.m <= 32):
            raise ValueError(f"N:M by row needs a sparsity in [0, 1) and 1 ≤ M ≤ 32, not {self.p} and {self.m}")

    width = 0
    local = False

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        rows, columns = score.shape
        if columns % self.m:
            raise ValueError(f"groups of {self.m} do not divide {columns} columns")
        best, order = score.reshape(rows, -1, self.m).sort(dim=2, descending=True)
        worth = best.sum(1)  # (rows, m): of the k-th place
        n = keep_largest(worth.reshape(1, -1), round(self.p * worth.numel())).reshape(worth.shape).sum(1)
        places = (torch.arange(self.m) < n[:, None])[:, None].expand_as(order)
        return torch.empty_like(places).scatter_(2, order, places).reshape(rows, columns)


@dataclass(frozen=True)
class Fixed:
    """A mask chosen before: ``mask`` bool (out, in), True = keep."""

    mask: Tensor

    width = 1
    local = False

    @property
    def p(self) -> float:
        return 1 - float(self.mask.float().mean())

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        return self.mask[:, at : at + score.shape[1]]


@dataclass(frozen=True)
class Both:
    """A pattern of zeros and a grid of levels; either may be None (dense, or full precision).

    ``within``: (out, in) bool, weights that may be kept; the others are zeros of an earlier shot, and go first.
    ``worth``: (out,) positive, what the scores of a row count beside those of other rows.
    """

    pattern: Sparse | NM | NMByRow | Fixed | None = None
    grid: Grid | None = None
    within: Tensor | None = None
    worth: Tensor | None = None

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        """Keep-mask for the columns that start at column ``at``."""
        if self.worth is not None:
            score = score * self.worth[:, None]
        if self.within is None:
            keep = torch.ones_like(score, dtype=torch.bool)
            return keep if self.pattern is None else self.pattern.select(score, at)
        allowed = self.within[:, at : at + score.shape[1]]
        if self.pattern is None:
            return allowed.clone()
        return self.pattern.select(score.masked_fill(~allowed, -torch.inf), at) & allowed

    def project(self, w: Tensor, score: Tensor | None = None) -> Tensor:
        """Nearest weights that satisfy the constraint, keeping the largest ``score`` (default |w|)."""
        return Stack(((w.shape[0], self),)).project(w, score)


Constraint = Sparse | NM | NMByRow | Fixed | Grid | Both


def both(constraint: Constraint | None) -> Both:
    """The same constraint in the one general form."""
    if constraint is None:
        return Both()
    if isinstance(constraint, Both):
        return constraint
    return Both(grid=constraint) if isinstance(constraint, Grid) else Both(pattern=constraint)


@dataclass(frozen=True)
class Stack:
    """Constraints of layers that share their input, stacked by rows: ``parts = ((rows, Both), …)``.

    Layers of one stack are solved in one sweep, each under its own budget. All parts have a grid or
    none has, with equal group sizes (bits may differ).
    """

    parts: tuple[tuple[int, Both], ...]

    def __post_init__(self) -> None:
        sizes = {part.grid.group_size if part.grid else "none" for _, part in self.parts}
        if len(sizes) > 1:
            raise ValueError(f"stacked layers must agree on having a grid and on its group size, not {sizes}")

    @classmethod
    def of(cls, constraint: Constraint | Stack | None, rows: int) -> Stack:
        return constraint if isinstance(constraint, Stack) else cls(((rows, both(constraint)),))

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.parts)

    @property
    def sparse(self) -> bool:
        return any(part.pattern is not None for _, part in self.parts)

    @property
    def quantized(self) -> bool:
        return self.parts[0][1].grid is not None

    @property
    def group_size(self) -> int | None:
        grid = self.parts[0][1].grid
        return grid.group_size if grid else None

    @property
    def width(self) -> int:
        """Least common multiple of the patterns' widths; 0 where one decides over all columns."""
        return lcm(*(part.pattern.width for _, part in self.parts if part.pattern))

    @property
    def local(self) -> bool:
        """Whether a pattern decides every few columns on their own."""
        return any(part.pattern.local for _, part in self.parts if part.pattern)

    def slices(self) -> list[tuple[slice, Both]]:
        out, start = [], 0
        for rows, part in self.parts:
            out.append((slice(start, start + rows), part))
            start += rows
        return out

    def select(self, score: Tensor, at: int = 0) -> Tensor:
        keep = torch.ones_like(score, dtype=torch.bool)
        for rows, part in self.slices():
            if part.pattern is not None:
                keep[rows] = part.select(score[rows], at)
        return keep

    def ordered(self, order: Tensor) -> Stack:
        """The same constraints of weights whose columns are in another order."""

        def turned(part: Both) -> Both:
            pattern = Fixed(part.pattern.mask[:, order]) if isinstance(part.pattern, Fixed) else part.pattern
            return replace(part, pattern=pattern, within=None if part.within is None else part.within[:, order])

        return Stack(tuple((rows, turned(part)) for rows, part in self.parts))

    def fit(self, w: Tensor) -> GridParams:
        """Grid parameters of one group of columns, (rows, 1)."""
        return _cat([part.grid.fit(w[rows]) for rows, part in self.slices() if part.grid])

    def fit_all(self, w: Tensor) -> GridParams:
        """Grid parameters of every group, (rows, groups)."""
        return _cat([part.grid.fit_all(w[rows]) for rows, part in self.slices() if part.grid])

    def freeze(self, mask: Tensor) -> Stack:
        """The same grids under a mask that is already chosen, ``mask: (rows, in)``."""
        return Stack(tuple((s.stop - s.start, Both(Fixed(mask[s]), part.grid)) for s, part in self.slices()))

    def project(self, w: Tensor, score: Tensor | None = None) -> Tensor:
        if self.sparse:
            w = torch.where(self.select(w.abs() if score is None else score), w, 0.0)
        if not self.quantized:
            return w
        params = self.fit_all(w)
        return Codes.round(w, params, 8, self.group_size).decode()


def _cat(parts: Sequence[GridParams]) -> GridParams:
    if len(parts) == 1:
        return parts[0]
    return GridParams(
        torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]), torch.cat([p.levels for p in parts])
    )
