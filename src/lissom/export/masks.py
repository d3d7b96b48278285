"""Which weights of a layer are stored: masks as streams, and entries picked by them or put back.

A mask (out, in) is written as the smallest of: nothing (all weights stored), one bit a weight, blocks of counts and ranks;
for N:M as the rank of the N kept positions of every group of M inputs, for n:M as the N of every row and those ranks.
"Wide": columns padded to whole groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import FormatError
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
from .layout import parse_pattern, row_group

RANK_WIDTHS = np.array([(comb(MAX_GROUP, k) - 1).bit_length() for k in range(MAX_GROUP + 1)])
COUNT_BITS = 6
MASK_NAMES = ("mask", "counts", "ranks", "kept", "index")


def write_mask(
    nonzero: NDArray[np.bool_], pattern: str, width: int | None, hint: NDArray[np.bool_] | None = None
) -> tuple[dict[str, Tensor], NDArray[np.bool_] | None]:
    """Streams by name, and which entries are stored: wide, None = all of them.

    ``nonzero`` (out, in); ``width``: bits that leaving out one weight saves, None where the mask must be stored whatever it
    costs; ``hint``: positions that fill up the groups of N:M first. Raises :class:`FormatError` when a group has too many.
    """
    nm = parse_pattern(pattern)
    if m := row_group(pattern):
        kept = _widen(nonzero, m).reshape(len(nonzero), -1, m).sum(2).max(1)
        n = kept.repeat(-(-nonzero.shape[1] // m))
        keep = _fill(nonzero, n, m, hint)
        index = pack_ragged(rank(keep.reshape(-1, m)), _index_widths(m)[n])
        return {"kept": torch.from_numpy(kept.astype(np.uint8)), "index": torch.from_numpy(index)}, keep
    if nm is not None:
        keep = _fill(nonzero, np.full(len(nonzero) * -(-nonzero.shape[1] // nm[1]), nm[0]), nm[1], hint)
        index = rank(keep.reshape(-1, nm[1]))
        return {"index": torch.from_numpy(pack_bits(index, rank_width(nm[1], nm[0])))}, keep
    if pattern == "dense":
        return {}, None
    streams = _smallest(nonzero.reshape(-1), width)
    return {name: torch.from_numpy(data) for name, data in streams.items()}, nonzero if streams else None


def read_mask(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: str) -> NDArray[np.bool_] | None:
    """Inverse of :func:`write_mask` for the streams among ``tensors``: the wide mask, None = all weights are stored."""
    rows, columns = shape
    total, nm = rows * columns, parse_pattern(pattern)
    found = [name for name in MASK_NAMES if name in tensors]
    by_row = row_group(pattern)
    legal = (
        [["index"]] if nm
        else [["kept", "index"]] if by_row
        else [[], ["mask"], ["counts", "ranks"]] if pattern == "unstructured"
        else [[]]
    )  # fmt: skip
    if found not in legal:
        raise FormatError(f"a {pattern} layer cannot have the tensors {', '.join(found) or 'of a dense one'}")
    arrays = {name: tensors[name].numpy() for name in found}
    if "mask" in arrays:
        return unpack_bits(arrays["mask"], 1, total).astype(bool).reshape(rows, columns)
    if "counts" in arrays:
        counts = unpack_bits(arrays["counts"], COUNT_BITS, -(-total // MAX_GROUP)).astype(np.int64)
        ranks = unpack_ragged(arrays["ranks"], RANK_WIDTHS[counts])
        flat = unrank(ranks, MAX_GROUP, counts).reshape(-1)
        if flat[total:].any():
            raise FormatError("the mask has weights behind the end of the layer")
        return flat[:total].reshape(rows, columns)
    if by_row:
        kept = arrays["kept"].astype(np.int64)
        if kept.shape != (rows,) or (rows and int(kept.max()) > by_row):
            raise FormatError(f"kept must be {rows} numbers of at most {by_row}, one for each row")
        n = kept.repeat(-(-columns // by_row))
        ranks = unpack_ragged(arrays["index"], _index_widths(by_row)[n])
        return unrank(ranks, by_row, n).reshape(rows, -1)
    if "index" in arrays and nm:
        groups = rows * -(-columns // nm[1])
        ranks = unpack_bits(arrays["index"], rank_width(nm[1], nm[0]), groups).astype(np.int64)
        return unrank(ranks, nm[1], nm[0]).reshape(rows, -1)
    return None


def mask_of(wide: NDArray[np.bool_] | None, columns: int) -> Tensor | None:
    """(out, in) bool."""
    return None if wide is None else torch.from_numpy(np.ascontiguousarray(wide[:, :columns]))


def pick(values: NDArray, wide: NDArray[np.bool_] | None, absent: NDArray | np.generic) -> NDArray:
    """The stored entries of ``values`` (…, out, in); ``absent`` (broadcastable) stands behind the end of a row."""
    if wide is None:
        return values
    extra = wide.shape[1] - values.shape[-1]
    if extra:
        spare = np.broadcast_to(absent, values.shape)[..., -1:].repeat(extra, axis=-1)
        values = np.concatenate([values, spare], axis=-1)
    return values[..., wide]


def place(
    stream: NDArray, absent: NDArray | np.generic, wide: NDArray[np.bool_] | None, shape: tuple[int, ...]
) -> NDArray:
    """The full array of ``shape`` (…, out, in): ``stream`` at the stored positions, ``absent`` elsewhere."""
    lead, (rows, columns) = shape[:-2], shape[-2:]
    count = rows * columns if wide is None else int(wide.sum())
    if stream.size != int(np.prod(lead, dtype=np.int64)) * count:
        room = f"the mask has room for {count}" if wide is not None else f"the layer has {rows} × {columns}"
        raise FormatError(f"{stream.size} weights are stored, {room}")
    if wide is None:
        return stream.reshape(shape).copy()
    out = np.zeros((*lead, *wide.shape), stream.dtype)
    out[..., :columns] = absent
    out[..., wide] = stream.reshape(*lead, count)
    return np.ascontiguousarray(out[..., :columns])


def _widen(mask: NDArray[np.bool_], m: int) -> NDArray[np.bool_]:
    """Columns padded with False to whole groups of ``m``."""
    return np.pad(mask, ((0, 0), (0, -mask.shape[1] % m)))


def _index_widths(m: int) -> NDArray[np.int64]:
    """Bits of a rank of n positions among ``m``, for n = 0 … m."""
    return np.array([rank_width(m, n) for n in range(m + 1)])


def _fill(
    nonzero: NDArray[np.bool_], n: NDArray[np.int64], m: int, hint: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Exactly ``n`` (groups,) kept positions in each group of ``m``: the non-zeros, then the hint's, then the first ones."""
    keep = _widen(nonzero, m).reshape(-1, m)
    counts = keep.sum(1)
    if (counts > n).any():
        bad, most = int((counts > n).sum()), int(n.max())
        raise FormatError(
            f"{bad} of {counts.size} groups of {m} inputs hold more than {most} non-zeros: not an {most}:{m} layer"
        )
    if (counts < n).any():
        short = counts < n
        priority = 2 * keep[short].astype(np.int8)
        if hint is not None:
            priority += _widen(hint, m).reshape(-1, m)[short]
        order = np.argsort(-priority, axis=1, kind="stable")
        chosen = np.zeros_like(priority, bool)
        np.put_along_axis(chosen, order, np.arange(m) < n[short, None], 1)
        keep = keep.copy()
        keep[short] = chosen
    return keep.reshape(nonzero.shape[0], -1)


def _smallest(mask: NDArray[np.bool_], width: int | None) -> dict[str, NDArray]:
    """The smallest of: one bit a weight, blocks of counts and ranks, nothing (all weights stored)."""
    nonzeros, bitmap = int(mask.sum()), stream_bytes(mask.size, 1)
    blocks = np.pad(mask, (0, -mask.size % MAX_GROUP)).reshape(-1, MAX_GROUP)
    counts = blocks.sum(1)
    widths = RANK_WIDTHS[counts]
    ranked = stream_bytes(counts.size, COUNT_BITS) + stream_bytes(int(widths.sum()), 1)
    if width is not None and stream_bytes(mask.size, width) <= min(bitmap, ranked) + stream_bytes(nonzeros, width):
        return {}
    if bitmap <= ranked:
        return {"mask": pack_bits(mask, 1)}
    return {"counts": pack_bits(counts, COUNT_BITS), "ranks": pack_ragged(rank(blocks), widths)}
