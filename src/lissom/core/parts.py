"""How the tensors of a stored form are to be written: metadata of dataclass fields, so that files know no method by name.

A field that is a tensor has a :class:`Part`. A field that holds another form, a :class:`Rotation` or a plain number
needs none: its type says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["integer", "number", "sparse", "row", "mask"]
MIXES = {"mixes": True}  # metadata of a ``base`` whose decoding mixes weights: no zero of the result is a zero below


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

    kind: Kind
    per_weight: bool = False
    dtype: torch.dtype = torch.uint8
    unit: str | None = None


def part(kind: Kind, per_weight: bool = False, dtype: torch.dtype = torch.uint8, unit: str | None = None) -> Any:
    """A dataclass field for a tensor that is stored as :class:`Part` says."""
    return field(metadata={"part": Part(kind, per_weight, dtype, unit)})
