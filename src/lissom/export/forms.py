"""Forms of :mod:`lissom.core.stored` as tensors and plain JSON, and back, bit for bit.

Nothing here knows a method or a form: the fields of a form say how they are stored (:class:`lissom.core.parts.Part`).
A tensor that is constant becomes a number of the description; integers become streams of as many bits as the largest
needs; floats take the smallest of the formats in :data:`_FLOATS` that gives them back exactly. Below a mask only the
entries that it keeps are stored, down to where decoding mixes weights (a rotation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import (
    Affine,
    Binary,
    Codes,
    Columns,
    FormatError,
    Levels,
    LowRank,
    Masked,
    Patched,
    Plain,
    Rotated,
    Rotation,
    Scaled,
    Second,
    Stored,
    TwoLevel,
)
from ..core.parts import Mixes, Part
from .bits import pack_bits, unpack_bits
from .layout import parse_pattern
from .masks import MASK_NAMES, mask_of, pick, place, read_mask, write_mask

FORMS: dict[str, type] = {
    cls.__name__.lower(): cls
    for cls in (
        Affine, Binary, Codes, Columns, Levels, LowRank, Masked, Patched, Plain, Rotated, Scaled, Second, TwoLevel,
    )
}  # fmt: skip
# name in the file → to its bytes' dtype, and back to fp32; smallest first
_FLOATS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "e8m0": (
        lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8),
        lambda t: t.view(torch.float8_e8m0fnu).float(),
    ),
    "e4m3": (
        lambda t: t.to(torch.float8_e4m3fn).view(torch.uint8),
        lambda t: t.view(torch.float8_e4m3fn).float(),
    ),
    "float16": (lambda t: t.half(), lambda t: t.float()),
    "float32": (lambda t: t, lambda t: t),
}
_STORED_AS = {"e8m0": torch.uint8, "e4m3": torch.uint8, "float16": torch.float16, "float32": torch.float32}
Keep = NDArray[np.bool_] | None  # wide mask of the entries that are stored; None: all


def write_form(form: Stored, shape: tuple[int, int], pattern: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their path in the form ("base.values"), and the description that :func:`read_form` needs.

    ``shape`` (out, in) of the layer; ``pattern`` of its zeros, which makes masks smaller where it is N:M.
    """
    writer = _Writer(shape, pattern)
    description = writer.form(form, "", None)
    return writer.tensors, description


def read_form(tensors: Mapping[str, Tensor], description: Mapping[str, Any], shape: tuple[int, int]) -> Stored:
    """Inverse of :func:`write_form` for a layer of ``shape`` (out, in). Raises :class:`FormatError` for damaged data."""
    reader = _Reader(tensors, shape)
    try:
        form = reader.form(description, "", None)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"the description of the layer's form is damaged: {error!r}") from error
    if left := set(tensors) - reader.seen:
        raise FormatError(f"the layer has tensors that its form does not: {', '.join(sorted(left))}")
    return form


def form_names(description: Any, at: str = "") -> Iterator[str]:
    """The names that tensors of a form may have."""
    for name, entry in description.items() if isinstance(description, Mapping) else ():
        if isinstance(entry, Mapping) and "form" in entry:
            yield from form_names(entry, f"{at}{name}.")
        elif isinstance(entry, Mapping):
            yield f"{at}{name}"
            yield from (f"{at}{mask}" for mask in MASK_NAMES if "pattern" in entry)


@cache
def _parts(cls: type) -> tuple[tuple[str, Part | None, bool], ...]:
    """(field, part, whether decoding mixes what is below), masks first: they hide entries of the other fields."""
    out = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        said = getattr(hint, "__metadata__", ())
        out.append(
            (name, next((m for m in said if isinstance(m, Part)), None), any(isinstance(m, Mixes) for m in said))
        )
    return tuple(sorted(out, key=lambda f: f[1] is None or f[1].kind != "mask"))


class _Writer:
    def __init__(self, shape: tuple[int, int], pattern: str):
        self.shape, self.pattern = shape, pattern
        self.tensors: dict[str, Tensor] = {}

    def form(self, form: Any, at: str, keep: Keep) -> dict[str, Any]:
        out: dict[str, Any] = {"form": type(form).__name__.lower()}
        for name, part, mixes in _parts(type(form)):
            value = getattr(form, name)
            if part is None and type(value) in FORMS.values():
                out[name] = self.form(value, f"{at}{name}.", None if mixes else keep)
            elif part is None:
                out[name] = dataclasses.asdict(value) if isinstance(value, Rotation) else value
            elif part.kind == "mask":
                keep, out[name] = self.mask(value.numpy(), at, None)
            elif part.kind == "sparse":
                own, how = self.mask((value != 0).numpy(), at, 16)
                kept = torch.from_numpy(pick(value.numpy(), own, np.float32(0)))
                out[name] = how | self.number(kept, f"{at}{name}", None)
            elif part.kind == "row":
                counts = torch.bincount(value, minlength=self.shape[0])
                out[name] = self.integer(counts, f"{at}{name}", Part("integer"), None)
            elif part.kind == "number":
                out[name] = self.number(value, f"{at}{name}", getattr(form, part.unit) if part.unit else None)
            else:
                out[name] = self.integer(value, f"{at}{name}", part, keep)
        return out

    def mask(self, mask: NDArray[np.bool_], at: str, width: int | None) -> tuple[Keep, dict[str, Any]]:
        nm = parse_pattern(self.pattern)
        # an index keeps exactly N of M, so it can stand for a mask of fewer only where the values say zero too
        exact = nm is not None and (width is not None or _is_exact(mask, nm))
        pattern = self.pattern if exact else "unstructured"
        streams, keep = write_mask(mask, pattern, width)
        self.tensors |= {f"{at}{name}": data for name, data in streams.items()}
        return keep, {"pattern": pattern}

    def integer(self, value: Tensor, name: str, part: Part, keep: Keep) -> dict[str, Any]:
        raw = value.to(torch.int64).numpy()
        out: dict[str, Any] = {"shape": list(raw.shape)}
        flat = pick(raw, keep, np.int64(0)) if part.per_weight else raw
        if flat.size == 0 or bool((flat == flat.flat[0]).all()):
            return out | {"constant": int(flat.flat[0]) if flat.size else 0}
        width = int(flat.max()).bit_length()
        self.tensors[name] = torch.from_numpy(pack_bits(flat, width))
        return out | {"bits": width}

    def number(self, value: Tensor, name: str, unit: float | None) -> dict[str, Any]:
        value = value.contiguous()
        if value.numel() == 0 or bool((value == value.reshape(-1)[0]).all()):
            return {"shape": list(value.shape), "constant": float(value.reshape(-1)[0]) if value.numel() else 0.0}
        for kind, (encode, decode) in _FLOATS.items():
            for divisor in dict.fromkeys((1.0, unit or 1.0)):
                data = encode(value / divisor)
                if torch.equal(decode(data) * divisor, value):
                    self.tensors[name] = data.contiguous()
                    return {"as": kind, "unit": divisor} if divisor != 1.0 else {"as": kind}
        raise FormatError(f"{name} holds numbers that are not finite")


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]):
        self.tensors, self.shape = tensors, shape
        self.seen: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FormatError(f"the layer must have the tensor {name}")
        self.seen.add(name)
        return self.tensors[name]

    def form(self, description: Mapping[str, Any], at: str, keep: Keep) -> Any:
        cls = FORMS.get(description["form"])
        if cls is None:
            raise FormatError(f"unknown form {description['form']!r}; a newer lissom may have written it")
        made: dict[str, Any] = {}
        for name, part, mixes in _parts(cls):
            path, entry = f"{at}{name}", description.get(name)
            if part is not None and part.kind == "mask":
                keep = self.mask(description[name], at)
                made[name] = mask_of(keep, self.shape[1])
                if made[name] is None:
                    raise FormatError(f"the layer must have the mask {path}")
            elif part is not None:
                made[name] = self.tensor(part, description[name], path, at, keep)
            elif isinstance(entry, Mapping):
                nested = "form" in entry
                made[name] = self.form(entry, f"{path}.", None if mixes else keep) if nested else Rotation(**entry)
            else:
                made[name] = description[name]
        return cls(**made)

    def tensor(self, part: Part, entry: Mapping[str, Any], path: str, at: str, keep: Keep) -> Tensor:
        if part.kind == "sparse":
            own = self.mask(entry, at)
            return torch.from_numpy(place(self.number(entry, path).numpy().reshape(-1), np.float32(0), own, self.shape))
        if part.kind == "number":
            return self.number(entry, path)
        if part.kind == "row":
            counts = self.integer(entry, path, Part("integer", dtype=torch.int64), None)
            return torch.repeat_interleave(torch.arange(len(counts)), counts)
        return self.integer(entry, path, part, keep)

    def mask(self, entry: Mapping[str, Any], at: str) -> Keep:
        streams = {name: self.take(f"{at}{name}") for name in MASK_NAMES if f"{at}{name}" in self.tensors}
        return read_mask(streams, self.shape, entry["pattern"])

    def integer(self, entry: Mapping[str, Any], name: str, part: Part, keep: Keep) -> Tensor:
        shape = tuple(entry["shape"])
        if part.per_weight and shape[-2:] != self.shape:
            raise FormatError(f"{name} has shape {shape}, which does not fit a layer of {self.shape}")
        if "constant" in entry:
            return torch.full(shape, entry["constant"], dtype=part.dtype)
        kept = keep if part.per_weight else None
        count = int(np.prod(shape, dtype=np.int64))
        if kept is not None:
            count = count // (self.shape[0] * self.shape[1]) * int(kept.sum())
        stream = unpack_bits(self.take(name).numpy(), int(entry["bits"]), count)
        wide = place(stream, stream.dtype.type(0), kept, shape) if part.per_weight else stream.reshape(shape)
        return torch.from_numpy(wide).to(part.dtype)

    def number(self, entry: Mapping[str, Any], name: str) -> Tensor:
        if "constant" in entry:
            return torch.full(tuple(entry["shape"]), entry["constant"], dtype=torch.float32)
        data = self.take(name)
        if data.dtype != _STORED_AS[entry["as"]]:
            raise FormatError(f"{name} must be {_STORED_AS[entry['as']]}, not {data.dtype}")
        out = _FLOATS[entry["as"]][1](data) * entry.get("unit", 1.0)
        if not bool(torch.isfinite(out).all()):
            raise FormatError(f"{name} has numbers that are not finite")
        return out


def _is_exact(mask: NDArray[np.bool_], nm: tuple[int, int]) -> bool:
    return mask.shape[1] % nm[1] == 0 and bool((mask.reshape(-1, nm[1]).sum(1) == nm[0]).all())
