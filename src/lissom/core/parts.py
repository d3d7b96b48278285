"""How the tensors of a stored form are to be written: types of fields, so that files know no method by name.

A field that is a tensor has one of the types below. A field that holds another form, a :class:`Rotation` or a plain number
needs none: its own type says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """``kind`` of a tensor:

    ==========  ======================================================================
    integer     unsigned integers; the file takes as many bits as the largest needs
    number      floats; the file takes the smallest format that is exact
    sparse      floats (out, in), of which zeros are left out behind a mask
    row         rising row numbers; the file counts the entries of each row
    mask        bool (out, in): where the ``base`` of the same form counts at all
    ==========  ======================================================================

    ``per_weight``: the last two axes are (out, in), and entries that a mask around the form hides need not be stored.
    ``dtype``: of integers in memory. ``unit``: the field by which numbers are divided before they are written.
    """

    kind: Literal["integer", "number", "sparse", "row", "mask"]
    per_weight: bool = False
    dtype: torch.dtype = torch.uint8
    unit: str | None = None


@dataclass(frozen=True)
class Mixes:
    """Marks a ``base`` whose decoding mixes weights: no zero of the result is a zero below."""


Integers = Annotated[Tensor, Part("integer")]
Indices = Annotated[Tensor, Part("integer", dtype=torch.int64)]
ZeroPoints = Annotated[Tensor, Part("integer", dtype=torch.float32)]
WeightCodes = Annotated[Tensor, Part("integer", per_weight=True)]
WeightSigns = Annotated[Tensor, Part("integer", per_weight=True, dtype=torch.bool)]
Numbers = Annotated[Tensor, Part("number")]
BlockScales = Annotated[Tensor, Part("number", unit="tensor_scale")]
SparseNumbers = Annotated[Tensor, Part("sparse")]
RowNumbers = Annotated[Tensor, Part("row")]
KeepMask = Annotated[Tensor, Part("mask")]
