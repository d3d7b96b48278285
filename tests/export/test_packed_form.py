"""The packed form: decode(encode(layer)) is the layer bit for bit, sizes follow the formula, damage is found."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solving import solve

from lissom.core import NM, Codes, FormatError, Grid, NMByRow, Solved, Sparse
from lissom.export import LayerPlan, Layout, Packed
from lissom.export.packed import packed_bits

CODEC = Packed()


def layer(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored_bits(tensors):
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values())


def roundtrip(solved, layout):
    tensors = CODEC.encode(solved, layout)
    return tensors, CODEC.decode(tensors, CODEC.entry(solved, layout))


def same_bits(a, b):
    return torch.equal((a + 0.0).view(torch.int32), b.view(torch.int32))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 3, 16, 32]),
    symmetric=st.booleans(),
    sparsity=st.sampled_from([None, 0.0, 0.3, 0.7, 0.95]),
    seed=st.integers(0, 999),
)
def test_quantized_layers_come_back(rows, columns, bits, group, symmetric, sparsity, seed):
    pattern = None if sparsity is None else Sparse(sparsity)
    solved = solve(layer(rows, columns, seed), pattern, Grid(bits, group, symmetric))
    layout = Layout(pattern="dense" if pattern is None else "unstructured")
    tensors, back = roundtrip(solved, layout)
    assert same_bits(solved.weight, back.weight)
    assert back.codes is not None and solved.codes is not None
    assert torch.equal(back.codes.values, solved.codes.values)
    assert torch.equal(back.codes.zero, solved.codes.zero)
    if back.mask is not None:
        assert torch.equal(back.mask, solved.weight != 0)
    plan = LayerPlan("l", (rows, columns), layout.pattern, bits, group, solved.codes.symmetric)
    bound = packed_bits(plan, int((solved.weight != 0).sum()))
    assert stored_bits(tensors) <= bound
    if pattern is None:
        assert stored_bits(tensors) == bound


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 32),
    part=st.floats(0, 1),
    groups=st.integers(1, 4),
    bits=st.sampled_from([None, 2, 3, 4, 8]),
    seed=st.integers(0, 999),
)
def test_every_nm_comes_back(m, part, groups, bits, seed):
    n = 1 + int(part * (m - 1))
    weight = layer(3, m * groups, seed)
    weight[0, :m] = 0  # a group with fewer non-zeros than the pattern keeps
    solved = solve(weight, NM(n, m), None if bits is None else Grid(bits, None))
    layout = Layout(torch.float32, f"{n}:{m}")
    tensors, back = roundtrip(solved, layout)
    assert same_bits(solved.weight, back.weight)
    assert back.mask is not None
    assert bool((back.mask.reshape(-1, m).sum(1) == n).all())
    assert not bool((solved.weight.bool() & ~back.mask).any())
    symmetric = solved.codes is None or solved.codes.symmetric
    plan = LayerPlan("l", (3, m * groups), layout.pattern, bits, None, symmetric)
    assert stored_bits(tensors) == packed_bits(plan, 0, value_bits=32)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 32), sparsity=st.floats(0, 0.95), groups=st.integers(1, 4), rows=st.integers(1, 9),
    bits=st.sampled_from([None, 2, 4]), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_nm_by_row_comes_back(m, sparsity, groups, rows, bits, seed):
    weight = layer(rows, m * groups, seed) * (1 + 3 * torch.arange(rows)[:, None])
    solved = solve(weight, NMByRow(sparsity, m), None if bits is None else Grid(bits, None))
    layout = Layout(torch.float32, f"n:{m}")
    tensors, back = roundtrip(solved, layout)
    assert same_bits(solved.weight, back.weight)
    kept = back.mask.reshape(rows, -1, m).sum(2)
    assert bool((kept == kept[:, :1]).all()) and not bool((solved.weight.bool() & ~back.mask).any())
    symmetric = solved.codes is None or solved.codes.symmetric
    plan = LayerPlan("l", tuple(weight.shape), layout.pattern, bits, None, symmetric)
    assert stored_bits(tensors) <= packed_bits(plan, int(back.mask.sum()), value_bits=32)


@pytest.mark.parametrize("columns", [5, 17, 31])
def test_nm_with_a_ragged_last_group(columns):
    weight = layer(4, columns)
    weight[:, 1::2] = 0
    codes = Codes.round(weight, Grid(4, 8).fit_all(weight), 4, 8)
    solved = Solved(codes.decode(), codes, None, torch.zeros(4))
    tensors, back = roundtrip(solved, Layout(pattern="2:4"))
    assert same_bits(solved.weight, back.weight)
    assert stored_bits(tensors) == packed_bits(LayerPlan("l", (4, columns), "2:4", 4, 8), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.9])
def test_weights_without_codes_keep_the_artefacts_dtype(dtype, sparsity):
    solved = solve(layer(7, 45), Sparse(sparsity))
    tensors, back = roundtrip(solved, Layout(dtype, "unstructured"))
    assert same_bits(solved.weight.to(dtype).float(), back.weight)
    value_bits = 32 if dtype == torch.float32 else 16
    plan = LayerPlan("l", (7, 45), "unstructured")
    assert stored_bits(tensors) <= packed_bits(plan, int((solved.weight != 0).sum()), value_bits)


def test_the_mask_takes_the_smallest_form():
    weight = layer(64, 128)
    names = {
        p: set(CODEC.encode(solve(weight, Sparse(p), Grid(4, None)), Layout(pattern="unstructured")))
        for p in (0.1, 0.5, 0.9)
    }
    assert names[0.1] == {"codes", "scale", "zero"}
    assert names[0.5] == {"codes", "scale", "zero", "mask"}
    assert names[0.9] == {"codes", "scale", "zero", "counts", "ranks"}
    # the entropy of a mask with 10% ones is 0.469 bits a weight
    ninety = CODEC.encode(solve(weight, Sparse(0.9)), Layout(pattern="unstructured"))
    assert 0.469 < stored_bits({k: ninety[k] for k in ("counts", "ranks")}) / weight.numel() < 0.56


def test_bits_per_weight_of_the_headline_recipe():
    """70% unstructured + INT4 per 128, and 2:4 + INT4: 4 · 0.3 + 1 and 4 · 0.5 + 3/4, plus 20/128 for the groups."""
    weight = layer(64, 512)
    sparse = CODEC.encode(solve(weight, Sparse(0.7), Grid(4, 128)), Layout(pattern="unstructured"))
    assert stored_bits(sparse) / weight.numel() < 4 * 0.3 + 1 + 20 / 128
    nm = CODEC.encode(solve(weight, NM(2, 4), Grid(4, 128)), Layout(pattern="2:4"))
    assert stored_bits(nm) / weight.numel() == 4 * 0.5 + 3 / 4 + 20 / 128


def test_equal_weights_give_equal_bytes_whatever_the_sign_of_zero():
    solved = solve(layer(4, 8), Sparse(0.5))
    negative = torch.where(solved.weight == 0, -0.0, solved.weight)
    flipped = Solved(negative, None, solved.mask, solved.error)
    a, b = (CODEC.encode(s, Layout(pattern="unstructured")) for s in (solved, flipped))
    assert all(torch.equal(a[k], b[k]) for k in a)


def damaged(tensors, name, change):
    return {k: change(v) if k == name else v for k, v in tensors.items()}


def test_damage_is_found():
    solved = solve(layer(8, 32), Sparse(0.5), Grid(3, 16))
    layout = Layout(pattern="unstructured")
    tensors, entry = CODEC.encode(solved, layout), CODEC.entry(solved, layout)

    def broken(change, name="codes", **over):
        with pytest.raises(FormatError) as error:
            CODEC.decode(damaged(tensors, name, change), entry | over)
        return str(error.value)

    assert "bytes instead of" in broken(lambda t: t[:-1])
    assert "bytes instead of" in broken(lambda t: t | 255, "mask")  # more weights than codes
    assert "not all finite" in broken(lambda t: t * float("inf"), "scale")
    assert "scale must be float16" in broken(lambda t: t.float(), "scale")
    assert "bytes instead of" in broken(lambda t: t, shape=[8, 64])
    assert "group_size" in broken(lambda t: t, group_size=0)
    assert "group_size" in broken(lambda t: t, bits=9)
    assert "unknown pattern" in broken(lambda t: t, pattern="3:2")
    assert "cannot have" in broken(lambda t: t, pattern="2:4")
    assert "shape must be" in broken(lambda t: t, shape=[8])
    assert "must have the tensors" in broken(lambda t: t, symmetric=True)


def test_ranks_out_of_range_are_found():
    solved = solve(layer(8, 32), NM(2, 4), Grid(4, None))
    layout = Layout(pattern="2:4")
    tensors, entry = CODEC.encode(solved, layout), CODEC.entry(solved, layout)
    with pytest.raises(FormatError, match="index 7 of group 0 is out of range: 4 positions allow 6"):
        CODEC.decode(damaged(tensors, "index", lambda t: t | 7), entry)


def test_numbers_kept_by_row_that_do_not_fit_are_found():
    solved = solve(layer(8, 32), NMByRow(0.5, 16), Grid(4, None))
    layout = Layout(pattern="n:16")
    tensors, entry = CODEC.encode(solved, layout), CODEC.entry(solved, layout)
    for change, words in [
        (lambda t: t[:-1], "kept must be 8 numbers of at most 16"),
        (lambda t: t + 16, "kept must be 8 numbers of at most 16"),
        (lambda t: t.clamp_max(1), "bytes instead of"),
    ]:
        with pytest.raises(FormatError, match=words):
            CODEC.decode(damaged(tensors, "kept", change), entry)
    with pytest.raises(FormatError, match="cannot have"):
        CODEC.decode({k: v for k, v in tensors.items() if k != "kept"}, entry)


def test_what_does_not_fit_is_refused():
    good = solve(layer(4, 8), None, Grid(4, None))
    assert good.codes is not None
    with pytest.raises(FormatError, match="more than 2 non-zeros"):
        CODEC.encode(good, Layout(pattern="2:4"))
    with pytest.raises(FormatError, match="exact in half precision"):
        codes = Codes(good.codes.values, good.codes.scale * 1.00001, good.codes.zero, 4, 8)
        CODEC.encode(Solved(codes.decode(), codes, None, good.error), Layout())
    with pytest.raises(FormatError, match="does not fit in 2 bits"):
        codes = Codes(good.codes.values, good.codes.scale, good.codes.zero, 2, 8)
        CODEC.encode(Solved(codes.decode(), codes, None, good.error), Layout())
    with pytest.raises(FormatError, match="do not fit in float16"):
        CODEC.encode(Solved(good.weight * 1e6, None, None, good.error), Layout())
    assert CODEC.check(LayerPlan("l", (4, 8), bits=9)) and CODEC.check(LayerPlan("l", (4, 8), "4:2"))
    assert not CODEC.check(LayerPlan("l", (4, 8), "2:4", 4, 3))


def test_packing_keeps_up_with_the_solver():
    """A 1536 × 576 layer is to be packed in 30 ms on a quiet machine; the bound here allows for a busy one."""
    weight = layer(1536, 576)
    for solved, layout in (
        (solve(weight, Sparse(0.7), Grid(4, 64)), Layout(pattern="unstructured")),
        (solve(weight, NM(2, 4), Grid(3, 64)), Layout(pattern="2:4")),
    ):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            CODEC.encode(solved, layout)
            times.append(time.perf_counter() - start)
        assert np.min(times) < 0.2
