"""lissom's packed form, version 1 (docs/packed-format.md): what was removed takes no space.

Tensors of a layer of shape (out, in), besides ``scale`` fp16 (out, groups) and, when asymmetric, ``zero``:

=====================  ==========================================================================
nothing else           every weight is stored
``mask``               one bit a weight, row by row; the non-zero weights are stored
``counts``, ``ranks``  the same mask in blocks of 63 weights: how many are non-zero, and which (smaller above
                       about 62% sparsity, and never below the entropy by more than the rounding of ranks)
``index``              N:M: rank of the N kept positions of every group of M inputs; N weights a group are stored
=====================  ==========================================================================

``left`` (out, r) and ``right`` (in, r), fp16, besides: left · rightᵀ is added to the (fp16) weights above.
The stored weights are ``codes`` of ``bits`` bits, or ``values`` in the artefact's dtype, in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import Codes, FormatError, LowRank, Plain, Solved
from .bits import (
    MAX_GROUP,
    pack_bits,
    pack_ragged,
    rank,
    rank_width,
    stream_bytes,
    unpack_bits,
    unpack_ragged,
    unrank,
)
from .layout import (
    DTYPES,
    LayerPlan,
    Layout,
    StoredLayer,
    check_codes,
    describe,
    need,
    parse_pattern,
    shape_of,
    stored_values,
)

VERSION = 1
_RANK_WIDTHS = np.array([(comb(MAX_GROUP, k) - 1).bit_length() for k in range(MAX_GROUP + 1)])
_COUNT_BITS = 6


class Packed:
    """Bit-exact for everything that has ``codes``, or nothing but zeros and plain weights."""

    name = "packed"

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        form = solved.stored
        if _factored(solved) and isinstance(form, LowRank):
            base = Solved(form.base.decode(), None, solved.mask, solved.error)
            out = self.encode(base, replace(layout, dtype=torch.float16))
            return out | {"left": form.A.half().contiguous(), "right": form.B.half().contiguous()}
        if solved.codes is None and form is not None and not isinstance(form, Plain):
            raise FormatError(
                f"the packed form, version 1, holds uniform grids and sparse plus low rank only, not {type(form).__name__}: "
                "save with format dense"
            )
        out: dict[str, Tensor] = {}
        if solved.codes is None:
            flat, absent = _flat_values(solved, layout.dtype), np.zeros((), _bits_dtype(layout.dtype))
            width = 8 * flat.itemsize
            nonzero = flat != 0
        else:
            check_codes(solved.codes)
            flat = solved.codes.values.contiguous().numpy()
            absent = _zero_codes(solved.codes)
            width = solved.codes.bits
            nonzero = flat != absent
            out["scale"] = solved.codes.scale.half().contiguous()
            if not solved.codes.symmetric:
                zero = solved.codes.zero.to(torch.uint8).contiguous().numpy()
                out["zero"] = torch.from_numpy(pack_bits(zero, width))
        nm = parse_pattern(layout.pattern)
        if nm is not None:
            keep = _fill(nonzero, nm, solved.mask)
            index = rank(keep.reshape(-1, nm[1]))
            out["index"] = torch.from_numpy(pack_bits(index, rank_width(nm[1], nm[0])))
            spare = np.broadcast_to(absent, flat.shape)[:, -1:].repeat(-flat.shape[1] % nm[1], axis=1)
            flat = np.concatenate([flat, spare], axis=1)[keep]
        elif layout.pattern == "unstructured":
            mask = _smallest_mask(nonzero.reshape(-1), width)
            out |= {name: torch.from_numpy(data) for name, data in mask.items()}
            flat = flat[nonzero] if mask else flat
        if solved.codes is None:
            out["values"] = torch.from_numpy(np.ascontiguousarray(flat).reshape(-1)).view(layout.dtype)
        else:
            out["codes"] = torch.from_numpy(pack_bits(flat, width))
        return out

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        if _factored(solved) and isinstance(solved.stored, LowRank):
            return describe(solved, replace(layout, dtype=torch.float16)) | {"rank": solved.stored.A.shape[1]}
        return describe(solved, layout)

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        rows, columns = shape_of(entry)
        if "rank" in entry:
            return self._read_factored(tensors, entry, (rows, columns))
        pattern, bits = entry.get("pattern", "dense"), entry.get("bits")
        nm = parse_pattern(pattern)
        masks = [name for name in ("mask", "counts", "ranks", "index") if name in tensors]
        legal = [["index"]] if nm else [[], ["mask"], ["counts", "ranks"]] if pattern == "unstructured" else [[]]
        if masks not in legal:
            raise FormatError(f"a {pattern} layer cannot have the tensors {', '.join(masks) or 'of a dense one'}")
        arrays = {name: tensors[name].numpy() for name in masks}
        wide = _read_mask(arrays, rows, columns, nm)  # (rows, columns padded to whole groups) or None
        mask = None if wide is None else torch.from_numpy(np.ascontiguousarray(wide[:, :columns]))
        if bits is None:
            (values,) = (need(tensors, "values", *masks)[0],)
            dtype = DTYPES.get(str(entry.get("dtype")))
            if values.dtype != dtype:
                raise FormatError(f"the values are {values.dtype}, the configuration says {entry.get('dtype')!r}")
            raw = _place(values.float().numpy(), np.float32(0), wide, rows, columns)
            return StoredLayer(None, mask, pattern, torch.from_numpy(raw))
        codes = self._read_codes(tensors, entry, wide, (rows, columns), masks)
        return StoredLayer(codes, mask, pattern)

    def _read_factored(
        self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any], shape: tuple[int, int]
    ) -> StoredLayer:
        rank = entry["rank"]
        for name, length in zip(("left", "right"), shape, strict=True):
            found = tensors.get(name)
            if found is None or found.dtype != torch.float16 or tuple(found.shape) != (length, rank):
                have = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise FormatError(f"{name} must be float16 ({length}, {rank}); it is {have}")
        rest = {k: v for k, v in tensors.items() if k not in ("left", "right")}
        base = self.decode(rest, {k: v for k, v in entry.items() if k != "rank"})
        form = LowRank(Plain(base.weight), tensors["left"].float(), tensors["right"].float())
        return StoredLayer(None, None, "dense", form.decode())

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
        values = _place(stream, absent, wide, rows, columns)
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


def _factored(solved: Solved) -> bool:
    """Whether the weight is a sparse matrix plus a product of factors, all in half precision (OATS)."""
    form = solved.stored
    return solved.codes is None and isinstance(form, LowRank) and isinstance(form.base, Plain)


def packed_bits(plan: LayerPlan, nonzeros: int, value_bits: int = 16, symmetric: bool | None = None) -> int:
    """Bits that :class:`Packed` needs at most for a layer with ``nonzeros`` non-zero weights, each stream in whole bytes.

    Exact for dense and N:M; for unstructured masks an upper bound, reached below about 62% sparsity.
    """
    rows, columns = plan.shape
    width = plan.bits or value_bits
    nm = parse_pattern(plan.pattern)
    total, mask = rows * columns, 0
    stored = total
    if nm:
        groups = rows * -(-columns // nm[1])
        stored, mask = groups * nm[0], 8 * stream_bytes(groups, rank_width(nm[1], nm[0]))
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
    if plan.pattern == "unstructured":
        each = min(1.0, _ranked_mask_bits(nonzeros / total))
        if each * total + nonzeros * plan.bits < total * plan.bits:
            stored, mask = nonzeros, each * total
    groups = rows * -(-columns // min(plan.group_size or columns, columns))
    return (mask + stored * plan.bits + groups * (16 + (0 if plan.symmetric else plan.bits))) / 8


def _ranked_mask_bits(density: float) -> float:
    """Mean bits a weight of blocks of counts and ranks, for independent weights that are non-zero with this chance."""
    chances = [comb(MAX_GROUP, k) * density**k * (1 - density) ** (MAX_GROUP - k) for k in range(MAX_GROUP + 1)]
    return (_COUNT_BITS + float(np.dot(chances, _RANK_WIDTHS))) / MAX_GROUP


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


def _widen(mask: NDArray[np.bool_], m: int) -> NDArray[np.bool_]:
    """Columns padded with False to whole groups of ``m``."""
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % m)))


def _fill(nonzero: NDArray[np.bool_], nm: tuple[int, int], mask: Tensor | None) -> NDArray[np.bool_]:
    """Exactly N kept positions in each group of M: the non-zeros, then the mask's, then the first ones."""
    n, m = nm
    keep = _widen(nonzero, m).reshape(-1, m)
    counts = keep.sum(1)
    if int(counts.max()) > n:
        bad = int((counts > n).sum())
        raise FormatError(
            f"{bad} of {counts.size} groups of {m} inputs hold more than {n} non-zeros: not an {n}:{m} layer"
        )
    if int(counts.min()) < n:
        short = counts < n
        priority = 2 * keep[short].astype(np.int8)
        if mask is not None:
            priority += _widen(mask.numpy(), m).reshape(-1, m)[short]
        order = np.argsort(-priority, axis=1, kind="stable")[:, :n]
        chosen = np.zeros_like(priority, bool)
        np.put_along_axis(chosen, order, True, 1)
        keep = keep.copy()
        keep[short] = chosen
    return keep.reshape(nonzero.shape[0], -1)


def _smallest_mask(mask: NDArray[np.bool_], width: int) -> dict[str, NDArray]:
    """The smallest of: one bit a weight, blocks of counts and ranks, nothing (all weights stored)."""
    nonzeros, bitmap = int(mask.sum()), stream_bytes(mask.size, 1)
    blocks = np.pad(mask, (0, -mask.size % MAX_GROUP)).reshape(-1, MAX_GROUP)
    counts = blocks.sum(1)
    widths = _RANK_WIDTHS[counts]
    ranked = stream_bytes(counts.size, _COUNT_BITS) + stream_bytes(int(widths.sum()), 1)
    if stream_bytes(mask.size, width) <= min(bitmap, ranked) + stream_bytes(nonzeros, width):
        return {}
    if bitmap <= ranked:
        return {"mask": pack_bits(mask, 1)}
    return {"counts": pack_bits(counts, _COUNT_BITS), "ranks": pack_ragged(rank(blocks), widths)}


def _read_mask(
    arrays: Mapping[str, NDArray], rows: int, columns: int, nm: tuple[int, int] | None
) -> NDArray[np.bool_] | None:
    total = rows * columns
    if "mask" in arrays:
        return unpack_bits(arrays["mask"], 1, total).astype(bool).reshape(rows, columns)
    if "counts" in arrays:
        counts = unpack_bits(arrays["counts"], _COUNT_BITS, -(-total // MAX_GROUP)).astype(np.int64)
        ranks = unpack_ragged(arrays["ranks"], _RANK_WIDTHS[counts])
        flat = unrank(ranks, MAX_GROUP, counts).reshape(-1)
        if flat[total:].any():
            raise FormatError("the mask has weights behind the end of the layer")
        return flat[:total].reshape(rows, columns)
    if "index" in arrays and nm:
        groups = rows * -(-columns // nm[1])
        ranks = unpack_bits(arrays["index"], rank_width(nm[1], nm[0]), groups).astype(np.int64)
        return unrank(ranks, nm[1], nm[0]).reshape(rows, -1)
    return None


def _place(
    stream: NDArray, absent: NDArray | np.generic, wide: NDArray[np.bool_] | None, rows: int, columns: int
) -> NDArray:
    """The full matrix: ``stream`` at the stored positions, ``absent`` elsewhere."""
    if wide is None:
        if stream.size != rows * columns:
            raise FormatError(f"{stream.size} weights are stored for a layer of {rows} × {columns}")
        return stream.reshape(rows, columns).copy()
    if stream.size != int(wide.sum()):
        raise FormatError(f"{stream.size} weights are stored, the mask has room for {int(wide.sum())}")
    out = np.zeros(wide.shape, stream.dtype)
    out[:, :columns] = absent
    out[wide] = stream
    return np.ascontiguousarray(out[:, :columns])
