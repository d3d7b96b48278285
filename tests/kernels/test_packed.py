"""Every kernel against its torch reference, on ragged shapes, every N, all group sizes and extreme scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core.errors import FormatError, LissomError
from lissom.core.grid import Codes
from lissom.kernels import Form, Packed, PackedBinary, choose, extension, isa, reference
from lissom.kernels.packed import tile_columns

ISAS = [""] if extension is None else extension.isas()  # every path that this processor can run
DENSE = {2: "int2", 3: "int3", 4: "int4", 6: "int6", 8: "int8"}


def random_codes(rows, columns, bits, group, seed=0, symmetric=False, extreme=False):
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    values = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=g) + 0.1
    if extreme:  # from the smallest subnormal half to the largest finite one
        scale = 2.0 ** torch.randint(-24, 16, (rows, groups), generator=g).float()
    zero = torch.full((rows, groups), 2.0 ** (bits - 1))
    if not symmetric:
        zero = torch.randint(0, 2**bits, (rows, groups), generator=g).float()
    return Codes(values, scale.half().float(), zero, bits, group)


def n_of_16(rows, columns, n, seed=0, exact=True):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, -(-columns // 16), 16, generator=g).argsort(2) < n
    return mask.reshape(rows, -1)[:, :columns].contiguous()


def activations(tokens, columns, seed=0, extreme=False):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    if extreme:
        x = x * 10.0 ** torch.randint(-30, 10, x.shape, generator=torch.Generator().manual_seed(seed + 1))
        x[:, : columns // 2] = 0
    return x


def check(codes, mask, form, x, threads=1):
    packed = Packed(codes, mask, form)
    weight = codes.decode() if mask is None else codes.decode() * mask
    assert torch.equal(packed.decode(), weight)  # unpack ∘ pack = identity, bit for bit
    expected = reference.linear(codes, mask, x, tile_columns(codes))
    # the sums inside a group are exact integers; only the sum over groups is rounded
    size = reference.linear(
        Codes(
            (codes.values.float() - codes.zero.repeat_interleave(codes.group_size, 1)[:, : codes.values.shape[1]])
            .abs()
            .to(torch.uint8),
            codes.scale,
            torch.zeros_like(codes.zero),
            8,
            codes.group_size,
        ),
        mask,
        x.abs(),
        tile_columns(codes),
    )
    for name in ISAS:
        error = (packed.linear(x, threads, name) - expected).abs()
        assert bool((error <= 1e-5 * size + 1e-35).all()), (name, form, float((error / (size + 1e-35)).max()))
    return packed


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dense(bits, group, symmetric):
    for rows, columns, tokens in [(16, 128, 1), (7, 200, 3), (35, 576, 9)]:
        codes = random_codes(rows, columns, bits, group, rows, symmetric)
        check(codes, None, Form(DENSE[bits]), activations(tokens, columns, tokens))


@pytest.mark.parametrize("n", range(1, 17))
@pytest.mark.parametrize("bits", [4, 8])
def test_n_of_16(n, bits):
    for rows, columns, tokens, group, symmetric in [
        (16, 64, 1, 64, True),
        (21, 200, 11, 32, False),
        (33, 256, 17, 128, False),
    ]:
        codes = random_codes(rows, columns, bits, group, n, symmetric)
        mask = n_of_16(rows, columns, n, n)
        form = Form("n:16 int4", -(-n // 2) * 2) if bits == 4 else Form("n:16 int8", -(-n // 4) * 4)
        check(codes, mask, form, activations(tokens, columns, n), threads=1 + n % 2)


def by_row(rows, columns, most, seed=0):
    """A mask of N:16 with N from 0 to ``most`` for each row."""
    n = torch.randint(0, most + 1, (rows, 1, 1), generator=torch.Generator().manual_seed(seed))
    return n_of_16(rows, columns, n, seed)


@pytest.mark.parametrize("most", [0, 3, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_n_of_16_by_row(most, symmetric):
    for rows, columns, tokens, group in [(1, 64, 1, 64), (21, 200, 11, 32), (70, 256, 17, 128)]:
        codes = random_codes(rows, columns, 4, group, most, symmetric)
        check(
            codes, by_row(rows, columns, most, most), Form("n:16 int4"), activations(tokens, columns, most), threads=2
        )


@pytest.mark.skipif(isa() == "torch", reason="needs the C++ extension")
def test_strips_of_rows_take_what_they_need():
    """Rows that keep 2 and 6 by turns: half of the strips have 2 slots, half of them 6."""
    codes = random_codes(64, 256, 4, 64, symmetric=True)
    codes.values[codes.values == 8] = 9  # none is zero by chance
    mask = n_of_16(64, 256, 6)
    mask[::2] = n_of_16(32, 256, 2)
    form = choose(codes, mask)
    assert (form, str(form)) == (Form("n:16 int4"), "N:16 by row int4")
    sizes = [Packed(codes, mask, f).bytes for f in (form, Form("n:16 int4", 6), Form("n:16 int4", 2, True))]
    prefix = 64 + 4 * 64  # slots of 4 strips, 64 rows
    assert sizes[0] == prefix + 4 * 4 * 32 + 256 // 16 * 32 * (2 * 1 + 2 * 3)  # tiles' scales, then pairs of slots
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_2_of_4(group):
    codes = random_codes(19, 320, 4, group)
    mask = torch.rand(19, 80, 4, generator=torch.Generator().manual_seed(3)).argsort(2) < 2
    check(codes, mask.reshape(19, 320), Form("2:4 int4", 8), activations(10, 320))


@pytest.mark.parametrize("slots", [2, 4, 6])
def test_slots_with_a_spill_list(slots):
    codes = random_codes(40, 384, 4, 128, slots)
    mask = torch.rand(40, 384, generator=torch.Generator().manual_seed(slots)) < 0.25
    packed = check(codes, mask, Form("n:16 int4", slots, True), activations(9, 384))
    if packed.matrix is not None:
        counts = (mask & (codes.values != codes.zero.repeat_interleave(128, 1))).reshape(40, 24, 16).sum(2)
        assert packed.matrix.spilled == int((counts - slots).clamp_min(0).sum())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 300), tokens=st.integers(1, 13), bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group=st.sampled_from([32, 64, 128, 512]), keep=st.sampled_from([None, 1.0, 0.6, 0.3, 0.1, 0.0]), seed=st.integers(0, 99),
    extreme=st.booleans(), threads=st.integers(1, 2),
)  # fmt: skip
def test_whatever_form_is_chosen(rows, columns, tokens, bits, group, keep, seed, extreme, threads):
    codes = random_codes(rows, columns, bits, min(group, columns) if group == 512 else group, seed, extreme=extreme)
    mask = None if keep is None else torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < keep
    check(codes, mask, None, activations(tokens, columns, seed, extreme), threads)


@pytest.mark.skipif("avx512" not in ISAS, reason="needs a processor with AVX-512 VNNI and VBMI")
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 5), group=st.sampled_from([32, 64, 128]), tokens=st.integers(1, 19),
    bits=st.sampled_from(list(DENSE)), n=st.integers(0, 16), symmetric=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_avx512_gives_the_bits_of_avx2(rows, groups, group, tokens, bits, n, symmetric):
    codes = random_codes(rows, groups * group, bits, group, n, symmetric)
    form, mask = Form(DENSE[bits]), None
    if n and bits in (4, 8):
        mask = n_of_16(rows, groups * group, n, n)
        form = Form("n:16 int4", -(-n // 2) * 2) if bits == 4 else Form("n:16 int8", -(-n // 4) * 4)
    packed, x = Packed(codes, mask, form), activations(tokens, groups * group, n, extreme=n % 2 == 1)
    assert torch.equal(packed.linear(x, 1, "avx512"), packed.linear(x, 1, "avx2"))


def test_a_path_can_be_forced(monkeypatch):
    for name in ISAS:
        monkeypatch.setenv("LISSOM_ISA", name)
        assert isa() == (name or "torch")
    if extension is not None:
        monkeypatch.setenv("LISSOM_ISA", "avx9000")
        with pytest.raises(LissomError, match="portable"):
            isa()


def test_worst_case_sums_do_not_overflow():
    """All codes and activations at their largest: 127 · 15 in every product of every accumulator."""
    for bits, kind in DENSE.items():
        codes = Codes(
            torch.full((16, 256), 2**bits - 1, dtype=torch.uint8), torch.ones(16, 2), torch.zeros(16, 2), bits, 128
        )
        check(codes, None, Form(kind), torch.full((9, 256), -3.0))
    codes = Codes(torch.full((16, 256), 15, dtype=torch.uint8), torch.ones(16, 2), torch.zeros(16, 2), 4, 128)
    for n in range(2, 17, 2):
        check(codes, n_of_16(16, 256, n), Form("n:16 int4", n), torch.full((9, 256), 3.0))


def test_forms_by_pattern():
    codes = random_codes(64, 256, 4, 64)
    assert choose(codes, None).kind == "int4"
    assert choose(codes, n_of_16(64, 256, 4)) == Form("n:16 int4", 4)
    assert choose(codes, n_of_16(64, 256, 5)).slots == 6
    assert choose(codes, n_of_16(64, 256, 8)).kind == "int4"
    assert choose(codes, n_of_16(64, 256, 12)).kind == "int4"
    g = torch.Generator().manual_seed(0)
    assert choose(codes, torch.rand(64, 256, generator=g) < 0.5).kind == "int4"  # slots would be slower
    assert choose(codes, torch.rand(64, 256, generator=g) < 0.1).spill
    assert choose(codes, (torch.rand(64, 64, 4, generator=g).argsort(2) < 2).reshape(64, 256)).kind == "2:4 int4"


@pytest.mark.skipif(isa() == "torch", reason="needs the C++ extension")
def test_what_cannot_be_packed_is_refused():
    codes = random_codes(16, 64, 4, 64)
    with pytest.raises(FormatError, match="more than 4 of 16"):
        Packed(codes, n_of_16(16, 64, 5), Form("n:16 int4", 4))
    with pytest.raises(FormatError, match="out of range"):
        Packed(codes, None, Form("int2"))
    with pytest.raises(FormatError, match="multiple of 32"):
        Packed(random_codes(16, 96, 4, 24))
    with pytest.raises(ValueError, match="64 columns"):
        Packed(codes).linear(torch.zeros(1, 32))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_binary_coded(bits, group):
    g = torch.Generator().manual_seed(bits)
    for rows, columns, tokens in [(16, 128, 1), (37, 384, 3)]:
        signs = torch.rand(bits, rows, columns, generator=g) < 0.5
        alpha = torch.rand(bits, rows, columns // group, generator=g).half().float()
        offset = torch.randn(rows, columns // group, generator=g).half().float()
        x = activations(tokens, columns, rows)
        packed = PackedBinary(signs, alpha, offset, group)
        expected = reference.binary_linear(signs, alpha, offset, group, x, packed.tile)
        for name in ISAS:
            torch.testing.assert_close(packed.linear(x, 2, name), expected, rtol=1e-4, atol=1e-3)


def test_the_reference_is_close_to_the_real_product():
    codes = random_codes(24, 256, 4, 64)
    x = activations(5, 256)
    exact = x @ codes.decode().T
    assert (reference.linear(codes, None, x, 64) - exact).norm() / exact.norm() < 0.01
