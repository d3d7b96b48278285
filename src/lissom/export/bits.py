"""Bit streams and combinatorial ranks: the two ways in which the packed form writes small integers.

A stream is little-endian: value ``i`` of ``width`` bits fills bits ``i·width … (i+1)·width − 1`` counted from
the lowest bit of the first byte; the last byte is padded with zero bits.

The kept positions ``p₁ < … < p_k`` of a group of ``m`` are written as their rank in the combinatorial number
system, ``rank = Σ C(p_i, i)`` (Lehmer 1964; Knuth TAOCP 7.2.1.3), a bijection onto ``0 … C(m, k) − 1``.
"""

from __future__ import annotations

from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from lissom.core import FormatError

MAX_GROUP = 63  # C(63, 31) < 2⁶³, so ranks fit in int64
_RUN = 1 << 16


def stream_bytes(count: int, width: int) -> int:
    """Length of a stream of ``count`` values."""
    return (count * width + 7) // 8


def pack_bits(values: NDArray, width: int) -> NDArray[np.uint8]:
    """Write unsigned ``values`` (any shape, read row by row) as a stream of ``width`` bits each (0 … 62)."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if width == 0 or flat.size == 0:
        return np.zeros(0, np.uint8)
    if width == 8:
        return flat.astype(np.uint8)
    if width == 1:
        return np.packbits(flat.astype(np.uint8), bitorder="little")
    if width in (2, 4):
        per = 8 // width
        padded = _padded(flat.astype(np.uint8), per).reshape(-1, per)
        out = padded[:, 0].copy()
        for k in range(1, per):
            out |= padded[:, k] << np.uint8(k * width)
        return out
    if width < 8:  # eight values fill exactly `width` bytes
        eights = _padded(flat.astype(np.uint64), 8).reshape(-1, 8)
        word = eights[:, 0].copy()
        for k in range(1, 8):
            word |= eights[:, k] << np.uint64(k * width)
        data = word.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
        return data[: stream_bytes(flat.size, width)].copy()
    return np.packbits(_bits_of(flat)[:, :width].reshape(-1), bitorder="little")


def unpack_bits(data: NDArray[np.uint8], width: int, count: int) -> NDArray:
    """The ``count`` values of a stream: uint8 up to 8 bits, int64 above.

    Raises :class:`FormatError` when the stream is not exactly as long as it must be or its padding is not zero.
    """
    data = np.ascontiguousarray(data).reshape(-1)
    need = stream_bytes(count, width)
    if data.size != need:
        raise FormatError(f"a stream of {count} values of {width} bits holds {data.size} bytes instead of {need}")
    spare = need * 8 - count * width
    if spare and int(data[-1]) >> (8 - spare):
        raise FormatError(f"the last byte of a stream of {count} values of {width} bits has bits behind its end")
    if width == 0 or count == 0:
        return np.zeros(count, np.uint8)
    if width == 8:
        return data.copy()
    if width == 1:
        return np.unpackbits(data, count=count, bitorder="little")
    if width in (2, 4):
        per, mask = 8 // width, np.uint8(2**width - 1)
        out = np.empty((data.size, per), np.uint8)
        for k in range(per):
            out[:, k] = (data >> np.uint8(k * width)) & mask
        return out.reshape(-1)[:count]
    if width < 8:
        groups = (count + 7) // 8
        wide = np.zeros((groups, 8), np.uint8)
        wide[:, :width] = _padded(data, groups * width, exact=True).reshape(groups, width)
        word = wide.view("<u8").reshape(-1)
        out = np.empty((groups, 8), np.uint8)
        for k in range(8):
            out[:, k] = (word >> np.uint64(k * width)) & np.uint64(2**width - 1)
        return out.reshape(-1)[:count]
    bits = np.zeros((count, 64), np.uint8)
    bits[:, :width] = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    return _values_of(bits)


def pack_ragged(values: NDArray[np.int64], widths: NDArray) -> NDArray[np.uint8]:
    """Like :func:`pack_bits` with a width for each value."""
    bits = [_bits_of(values[run])[_used(widths[run])] for run in _runs(widths.size)]
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *bits]), bitorder="little")


def unpack_ragged(data: NDArray[np.uint8], widths: NDArray) -> NDArray[np.int64]:
    """Inverse of :func:`pack_ragged`."""
    total = int(widths.sum(dtype=np.int64))
    if data.size != stream_bytes(total, 1):
        raise FormatError(f"a stream of {total} bits holds {data.size} bytes instead of {stream_bytes(total, 1)}")
    stream, out, at = np.unpackbits(data, count=total, bitorder="little"), np.zeros(widths.size, np.int64), 0
    for run in _runs(widths.size):
        used = _used(widths[run])
        bits, count = np.zeros(used.shape, np.uint8), int(used.sum())
        bits[used] = stream[at : at + count]
        out[run], at = _values_of(bits), at + count
    return out


def _runs(count: int) -> list[slice]:
    """Runs of values whose bits, a byte each, take some megabytes."""
    return [slice(at, at + _RUN) for at in range(0, count, _RUN)]


def _used(widths: NDArray) -> NDArray[np.bool_]:
    return np.arange(64)[None, :] < widths[:, None]


def rank_width(m: int, n: int) -> int:
    """Bits of the rank of ``n`` positions among ``m``: ⌈log₂ C(m, n)⌉."""
    return (comb(m, n) - 1).bit_length()


@cache
def _binomials(m: int) -> NDArray[np.int64]:
    """``table[p, k] = C(p, k)`` for p < m, k ≤ m."""
    return np.array([[comb(p, k) for k in range(m + 1)] for p in range(m)], np.int64)


def rank(keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rank of the true positions of each row of ``keep: (groups, m)``, among rows with as many."""
    groups, m = keep.shape
    table = _binomials(m)
    columns = np.ascontiguousarray(keep.T)
    seen, out = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for p in range(m):
        seen += columns[p]
        out += table[p][seen] * columns[p]
    return out


def unrank(ranks: NDArray[np.int64], m: int, counts: NDArray[np.int64] | int) -> NDArray[np.bool_]:
    """The keep-mask (groups, m) of each rank with ``counts`` true positions.

    Raises :class:`FormatError` when a rank is not below C(m, count).
    """
    left = np.broadcast_to(np.asarray(counts, np.int64), ranks.shape).copy()
    limit = np.array([comb(m, k) for k in range(m + 1)], np.int64)[left]
    if bool((ranks >= limit).any()):
        at = int(np.argmax(ranks >= limit))
        raise FormatError(f"index {int(ranks[at])} of group {at} is out of range: {m} positions allow {limit[at]}")
    table = _binomials(m)
    rest = ranks.astype(np.int64)
    keep = np.zeros((m, ranks.size), bool)
    for p in range(m - 1, -1, -1):
        step = table[p][left]
        take = (left > 0) & (rest >= step)
        keep[p] = take
        rest -= step * take
        left -= take
    return np.ascontiguousarray(keep.T)


def _padded(flat: NDArray, unit: int, exact: bool = False) -> NDArray:
    size = unit if exact else -(-flat.size // unit) * unit
    return flat if size == flat.size else np.concatenate([flat, np.zeros(size - flat.size, flat.dtype)])


def _bits_of(values: NDArray) -> NDArray[np.uint8]:
    raw = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(raw, axis=1, bitorder="little")


def _values_of(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.packbits(bits, axis=1, bitorder="little").view("<i8").reshape(-1).astype(np.int64)
