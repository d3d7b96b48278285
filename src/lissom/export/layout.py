"""What every codec shares: the layout that is asked for, a layer as it is stored, and the protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import Codes, FormatError, Levels, Solved, Stored, is_finite

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """How a layer is to be stored.

    ``dtype``: of weights that are not quantized. ``pattern``: "dense", "unstructured" or "N:M" ("2:4").
    ``transposed``: the Hugging Face layout is (in, out) (GPT-2's Conv1D). ``input_bits``: of the layer's rounded inputs,
    None when they are not; ``input_static``: with a constant scale.
    """

    dtype: torch.dtype = torch.float16
    pattern: str = "dense"
    transposed: bool = False
    input_bits: int | None = None
    input_static: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise FormatError(f"artefacts are stored in {', '.join(DTYPES)}, not {self.dtype}")
        parse_pattern(self.pattern)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(N, M) of an N:M pattern, None for "dense", "unstructured" and "n:M"; anything else is a :class:`FormatError`."""
    if pattern in ("dense", "unstructured") or row_group(pattern):
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if found and 1 <= int(found[1]) <= int(found[2]) <= 32:
        return int(found[1]), int(found[2])
    raise FormatError(f"unknown pattern {pattern!r}; it is dense, unstructured, N:M with 1 ≤ N ≤ M ≤ 32, or n:M")


def row_group(pattern: str) -> int | None:
    """M of "n:M", where every row has an N of its own; None for other patterns."""
    found = re.fullmatch(r"n:(\d+)", pattern)
    return int(found[1]) if found and 1 <= int(found[1]) <= 32 else None


@dataclass(frozen=True)
class LayerPlan:
    """A layer as a recipe will make it, for :meth:`Codec.check`. ``bits`` None: not quantized.

    ``shape`` (out, in); ``group_size`` None: one scale for each row; ``kind``: "linear" or "embedding". ``form``: of what is no
    uniform grid, see :func:`form_name`.
    """

    name: str
    shape: tuple[int, int]
    pattern: str = "dense"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    transposed: bool = False
    kind: str = "linear"
    form: str | None = None


@dataclass(frozen=True)
class StoredLayer:
    """A layer read back: ``codes`` with zero codes where the pattern has zeros (None: not quantized).

    ``mask`` (out, in) bool, False where the file stores nothing, None when dense. For N:M (n:M: for
    each row) it has exactly N true positions in each group of M, so a group with more zeros than the pattern asks for keeps positions whose
    weight is zero. ``values`` fp32 (out, in) when there are no codes. ``form``: what they decode from, when it is neither
    codes nor plain weights.
    """

    codes: Codes | None
    mask: Tensor | None
    pattern: str
    values: Tensor | None = None
    form: Stored | None = None

    @property
    def weight(self) -> Tensor:
        """fp32 (out, in)."""
        if self.codes is not None:
            return self.codes.decode()
        assert self.values is not None
        return self.values


def form_name(form: Stored) -> str:
    """The table's name of a codebook alone, else the form's own: "e4m3", "nvfp4", "scaled", …"""
    return form.name if isinstance(form, Levels) else type(form).__name__.lower()


class Codec(Protocol):
    """Solved layer → tensors with local names and back, for one format."""

    @property
    def name(self) -> str: ...

    @property
    def reader(self) -> str | None:
        """The package by which transformers loads the format; None when it cannot."""
        ...

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        """Tensors for the file, by local name ("weight", "codes", …)."""
        ...

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        """The layer's metadata, plain JSON."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        """Inverse of :meth:`encode`; raises :class:`FormatError` for damaged data."""
        ...

    def check(self, layer: LayerPlan) -> list[str]:
        """Why the format cannot hold the layer; empty when it can."""
        ...

    def advice(self, layer: LayerPlan) -> list[str]:
        """What the format wastes on the layer."""
        ...

    def config(self, entries: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any] | None:
        """``quantization_config`` of config.json for the entries of all layers."""
        ...


def describe(solved: Solved, layout: Layout) -> dict[str, Any]:
    """The metadata that all formats have in common."""
    codes = solved.codes
    out: dict[str, Any] = {"shape": list(solved.weight.shape), "pattern": layout.pattern}
    if codes is None:
        out |= {"bits": None, "dtype": dtype_name(layout.dtype)}
    else:
        out |= {"bits": codes.bits, "group_size": codes.group_size, "symmetric": codes.symmetric}
    if layout.transposed:
        out["transposed"] = True
    return out


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stored_values(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in the artefact's dtype, without negative zeros (equal weights must give equal bytes)."""
    out = weight.to(dtype) + 0.0
    if not is_finite(out):
        worst = float(weight.abs().max())
        raise FormatError(
            f"weights up to {worst:g} do not fit in {dtype_name(dtype)}: save with dtype bfloat16 or float32"
        )
    return out


def check_codes(codes: Codes) -> None:
    """Raise :class:`FormatError` unless fp16 scales and ``bits``-wide codes and zero points hold ``codes`` exactly."""
    top = 2**codes.bits
    if not 2 <= codes.bits <= 8:
        raise FormatError(f"codes of {codes.bits} bits cannot be stored; 2 … 8 are allowed")
    if int(codes.values.max()) >= top:
        raise FormatError(f"code {int(codes.values.max())} does not fit in {codes.bits} bits")
    if not torch.equal(codes.scale.half().float(), codes.scale.float()) or not bool(torch.isfinite(codes.scale).all()):
        raise FormatError("scales must be finite and exact in half precision; fit the grid with lissom.core.Grid")
    zero = codes.zero
    if bool(((zero < 0) | (zero >= top) | (zero != zero.round())).any()):
        raise FormatError(f"zero points must be integers 0 … {top - 1}")


def need(tensors: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """These tensors and no others; a :class:`FormatError` names what is missing or too much."""
    if set(tensors) != set(names):
        raise FormatError(
            f"the layer must have the tensors {', '.join(names)}; it has {', '.join(sorted(tensors)) or 'none'}"
        )
    return [tensors[name] for name in names]


def shape_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """(out, in) of an entry of the configuration."""
    shape = entry.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(isinstance(s, int) and s > 0 for s in shape):
        raise FormatError(f"shape must be two positive numbers, not {shape!r}")
    return shape[0], shape[1]
