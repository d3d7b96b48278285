"""lissom's packed form, version 1 (docs/packed-format.md): what was removed takes no space.

Tensors of a layer of shape (out, in), besides ``scale`` fp16 (out, groups) and, when asymmetric, ``zero``:

=====================  ==========================================================================
nothing else           every weight is stored
``mask``               one bit a weight, row by row; the non-zero weights are stored
``counts``, ``ranks``  the same mask in blocks of 63 weights: how many are non-zero, and which (smaller above
                       about 62% sparsity, and never below the entropy by more than the rounding of ranks)
``index``              N:M: rank of the N kept positions of every group of M inputs; N weights a group are stored
``kept``, ``index``    n:M: the same with an N for each row
=====================  ==========================================================================

The stored weights are ``codes`` of ``bits`` bits, or ``values`` in the artefact's dtype, in row-major order. Any other form
of :mod:`lissom.core.stored` is written as its fields say (:mod:`.forms`), and described under ``form`` of the layer's entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import Codes, FormatError, Masked, Plain, Solved, Stored
from .bits import MAX_GROUP, pack_bits, rank_width, stream_bytes, unpack_bits
from .forms import read_form, write_form
from .layout import (
    DTYPES,
    LayerPlan,
    Layout,
    StoredLayer,
    check_codes,
    describe,
    need,
    parse_pattern,
    row_group,
    shape_of,
    stored_values,
)
from .masks import COUNT_BITS, MASK_NAMES, RANK_WIDTHS, mask_of, pick, place, read_mask, write_mask

VERSION = 1


class Packed:
    """Bit-exact for every form that a solver makes."""

    name = "packed"
    reader = None

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        if (form := _form(solved)) is not None:
            return write_form(form, _shape(solved), layout.pattern)[0]
        out: dict[str, Tensor] = {}
        if solved.codes is None:
            flat, absent = _flat_values(solved, layout.dtype), np.zeros((), _bits_dtype(layout.dtype))
            width = 8 * flat.itemsize
        else:
            check_codes(solved.codes)
            flat = solved.codes.values.contiguous().numpy()
            absent = _zero_codes(solved.codes)
            width = solved.codes.bits
            out["scale"] = solved.codes.scale.half().contiguous()
            if not solved.codes.symmetric:
                zero = solved.codes.zero.to(torch.uint8).contiguous().numpy()
                out["zero"] = torch.from_numpy(pack_bits(zero, width))
        hint = None if solved.mask is None else solved.mask.numpy()
        streams, wide = write_mask(flat != absent, layout.pattern, width, hint)
        out |= streams
        flat = pick(flat, wide, absent)
        if solved.codes is None:
            out["values"] = torch.from_numpy(np.ascontiguousarray(flat).reshape(-1)).view(layout.dtype)
        else:
            out["codes"] = torch.from_numpy(pack_bits(flat, width))
        return out

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        out = describe(solved, layout)
        if (form := _form(solved)) is not None:
            out |= {"form": write_form(form, _shape(solved), layout.pattern)[1]}
            del out["dtype"]
        return out

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        rows, columns = shape = shape_of(entry)
        pattern, bits = entry.get("pattern", "dense"), entry.get("bits")
        if "form" in entry:
            form = read_form(tensors, entry["form"], shape)
            try:
                weight = form.decode()
            except (IndexError, RuntimeError, ValueError) as error:
                raise FormatError(f"the parts of the layer's form do not fit together: {error}") from error
            mask = form.mask if isinstance(form, Masked) else None
            return StoredLayer(None, mask, pattern, weight, form)
        masks = [name for name in MASK_NAMES if name in tensors]
        wide = read_mask({name: tensors[name] for name in masks}, shape, pattern)
        mask = mask_of(wide, columns)
        if bits is None:
            (values,) = (need(tensors, "values", *masks)[0],)
            dtype = DTYPES.get(str(entry.get("dtype")))
            if values.dtype != dtype:
                raise FormatError(f"the values are {values.dtype}, the configuration says {entry.get('dtype')!r}")
            raw = place(values.float().numpy(), np.float32(0), wide, shape)
            return StoredLayer(None, mask, pattern, torch.from_numpy(raw))
        codes = self._read_codes(tensors, entry, wide, (rows, columns), masks)
        return StoredLayer(codes, mask, pattern)

    def _read_codes(
        self,
        tensors: Mapping[str, Tensor],
        entry: Mapping[str, Any],
        wide: NDArray[np.bool_] | None,
        shape: tuple[int, int],
        masks: list[str],
    ) -> Codes:
        (rows, columns), bits, size = shape, entry["bits"], entry.get("group_size")
        if not isinstance(bits, int) or not 2 <= bits <= 8 or not isinstance(size, int) or not 1 <= size <= columns:
            raise FormatError(f"bits {bits!r} and group_size {size!r} do not fit a layer of {columns} inputs")
        groups = -(-columns // size)
        symmetric = bool(entry.get("symmetric"))
        codes, scale, *_ = need(tensors, "codes", "scale", *masks, *(() if symmetric else ("zero",)))
        if scale.dtype != torch.float16 or tuple(scale.shape) != (rows, groups):
            raise FormatError(f"scale must be float16 {(rows, groups)}, not {scale.dtype} {tuple(scale.shape)}")
        if not bool(torch.isfinite(scale).all()):
            raise FormatError("the scales are not all finite")
        if symmetric:
            zero = np.full((rows, groups), 2 ** (bits - 1), np.uint8)
        else:
            zero = unpack_bits(tensors["zero"].numpy(), bits, rows * groups).reshape(rows, groups)
        count = rows * columns if wide is None else int(wide.sum())
        stream = unpack_bits(codes.numpy(), bits, count)
        absent = np.repeat(zero, size, axis=1)[:, :columns]
        values = place(stream, absent, wide, shape)
        return Codes(torch.from_numpy(values), scale.float(), torch.from_numpy(zero).float(), bits, size)

    def check(self, layer: LayerPlan) -> list[str]:
        out = []
        if layer.bits is not None and not 2 <= layer.bits <= 8:
            out.append(f"{layer.name}: the packed form holds 2 … 8 bits, not {layer.bits}")
        try:
            parse_pattern(layer.pattern)
        except FormatError as error:
            out.append(f"{layer.name}: {error}")
        return out

    def advice(self, layer: LayerPlan) -> list[str]:
        return []

    def config(self, entries: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any] | None:
        return {"quant_method": "lissom", "version": VERSION, "layers": {name: dict(e) for name, e in entries.items()}}


def _form(solved: Solved) -> Stored | None:
    """What is stored instead of codes or plain weights, its zeros behind the layer's mask."""
    form = solved.stored
    if solved.codes is not None or form is None or isinstance(form, Plain):
        return None
    if solved.mask is None or isinstance(form, Masked):
        return form
    return Masked(form, solved.mask)


def _shape(solved: Solved) -> tuple[int, int]:
    rows, columns = solved.weight.shape
    return rows, columns


def packed_bits(plan: LayerPlan, nonzeros: int, value_bits: int = 16, symmetric: bool | None = None) -> int:
    """Bits that :class:`Packed` needs at most for a layer with ``nonzeros`` non-zero weights, each stream in whole bytes.

    Exact for dense and N:M; for n:M and unstructured masks an upper bound, reached below about 62% sparsity.
    """
    rows, columns = plan.shape
    width = plan.bits or value_bits
    nm = parse_pattern(plan.pattern)
    total, mask = rows * columns, 0
    stored = total
    if nm:
        groups = rows * -(-columns // nm[1])
        stored, mask = groups * nm[0], 8 * stream_bytes(groups, rank_width(nm[1], nm[0]))
    elif m := row_group(plan.pattern):
        groups = rows * -(-columns // m)
        # rows with other N than the mean have shorter ranks in the mean, up to the rounding to bits
        widest = max(rank_width(m, nonzeros // groups), rank_width(m, -(-nonzeros // groups)))
        stored, mask = nonzeros, 8 * rows + 8 * stream_bytes(groups, 1 + widest)
    elif plan.pattern == "unstructured" and total + nonzeros * width < total * width:
        stored, mask = nonzeros, 8 * stream_bytes(total, 1)
    out = mask + 8 * stream_bytes(stored, width)
    if plan.bits is not None:
        groups = rows * -(-columns // min(plan.group_size or columns, columns))
        out += 16 * groups
        if not (plan.symmetric if symmetric is None else symmetric):
            out += 8 * stream_bytes(groups, plan.bits)
    return out


def expected_bytes(plan: LayerPlan, nonzeros: float) -> float:
    """Bytes that :class:`Packed` needs for a quantized layer whose ``nonzeros`` lie anywhere with equal chance.

    Zeros that gather in some rows make real masks a little smaller.
    """
    assert plan.bits is not None
    rows, columns = plan.shape
    total = rows * columns
    stored, mask = float(total), 0.0
    if plan.pattern == "unstructured" or row_group(plan.pattern):
        each = min(1.0, _ranked_mask_bits(nonzeros / total))
        if each * total + nonzeros * plan.bits < total * plan.bits:
            stored, mask = nonzeros, each * total
    groups = rows * -(-columns // min(plan.group_size or columns, columns))
    return (mask + stored * plan.bits + groups * (16 + (0 if plan.symmetric else plan.bits))) / 8


def _ranked_mask_bits(density: float) -> float:
    """Mean bits a weight of blocks of counts and ranks, for independent weights that are non-zero with this chance."""
    chances = [comb(MAX_GROUP, k) * density**k * (1 - density) ** (MAX_GROUP - k) for k in range(MAX_GROUP + 1)]
    return (COUNT_BITS + float(np.dot(chances, RANK_WIDTHS))) / MAX_GROUP


def _bits_dtype(dtype: torch.dtype) -> type[np.unsignedinteger]:
    return np.uint32 if dtype == torch.float32 else np.uint16


def _flat_values(solved: Solved, dtype: torch.dtype) -> NDArray:
    """The weights as raw bit patterns: numpy has no bfloat16, and zero is all bits zero."""
    values = stored_values(solved.weight, dtype).contiguous()
    return values.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().view(_bits_dtype(dtype))


def _zero_codes(codes: Codes) -> NDArray[np.uint8]:
    """The code of zero at every position, (out, in)."""
    zero = codes.zero.to(torch.uint8).numpy()
    return np.repeat(zero, codes.group_size, axis=1)[:, : codes.values.shape[1]]
