"""Bit streams and ranks against naive loops, and unpack∘pack = identity."""

from itertools import combinations
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import FormatError
from lissom.export.bits import (
    pack_bits,
    pack_ragged,
    rank,
    rank_width,
    stream_bytes,
    unpack_bits,
    unpack_ragged,
    unrank,
)


def naive_stream(values: list[int], width: int) -> bytes:
    number = sum(v << (i * width) for i, v in enumerate(values))
    return number.to_bytes((len(values) * width + 7) // 8, "little")


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=50))))
def test_streams_equal_one_large_number_and_come_back(case):
    width, values = case
    data = pack_bits(np.array(values, np.int64), width)
    assert data.tobytes() == naive_stream(values, width)
    assert data.size == stream_bytes(len(values), width)
    assert unpack_bits(data, width, len(values)).tolist() == values


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 62), st.integers(0, 2**62)), max_size=40))
def test_ragged_streams_come_back(pairs):
    widths = np.array([w for w, _ in pairs], np.int64)
    values = np.array([v % (1 << w) for w, v in pairs], np.int64)
    data = pack_ragged(values, widths)
    expected, at = 0, 0
    for w, v in zip(widths.tolist(), values.tolist(), strict=True):
        expected, at = expected | v << at, at + w
    assert data.tobytes() == expected.to_bytes((at + 7) // 8, "little")
    assert unpack_ragged(data, widths).tolist() == values.tolist()


def test_ragged_streams_of_several_runs_come_back():
    draw = np.random.default_rng(0)
    widths = draw.integers(0, 15, 2**16 + 77)
    values = draw.integers(0, 2**30, widths.size) % 2**widths
    data = pack_ragged(values, widths)
    total, last = int(widths.sum()), int(widths[-9:].sum())
    end = np.unpackbits(data, count=total, bitorder="little")[total - last :]
    assert np.array_equal(np.packbits(end, bitorder="little"), pack_ragged(values[-9:], widths[-9:]))
    assert np.array_equal(unpack_ragged(data, widths), values)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 2), (5, 3), (8, 4), (7, 7), (9, 1)])
def test_ranks_number_the_combinations_in_colexicographic_order(m, n):
    every = sorted(combinations(range(m), n), key=lambda c: c[::-1])
    keep = np.array([[p in c for p in range(m)] for c in every])
    assert rank(keep).tolist() == list(range(comb(m, n)))
    assert (unrank(np.arange(comb(m, n)), m, n) == keep).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 63), st.integers(1, 20), st.integers(0, 2**32))
def test_unrank_inverts_rank_for_any_counts(m, groups, seed):
    keep = np.random.default_rng(seed).random((groups, m)) < 0.4
    ranks, counts = rank(keep), keep.sum(1)
    assert all(r < comb(m, k) for r, k in zip(ranks.tolist(), counts.tolist(), strict=True))
    assert (unrank(ranks, m, counts) == keep).all()


@pytest.mark.parametrize("m", [4, 16, 32])
def test_rank_width_is_the_logarithm_rounded_up(m):
    for n in range(1, m):
        assert rank_width(m, n) == int(np.ceil(log2(comb(m, n)) - 1e-12))


def test_damage_is_found():
    data = pack_bits(np.array([1, 2, 3]), 3)
    with pytest.raises(FormatError, match="holds 1 bytes instead of 2"):
        unpack_bits(data[:1], 3, 3)
    with pytest.raises(FormatError, match="behind its end"):
        unpack_bits(data | np.uint8(128), 3, 3)
    with pytest.raises(FormatError, match="index 6 of group 1 is out of range"):
        unrank(np.array([5, 6]), 4, 2)
    with pytest.raises(FormatError, match="holds"):
        unpack_ragged(np.zeros(3, np.uint8), np.array([5, 3]))
