"""The compiled loop of the sweep against its torch definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strips import agree, copied, entries, problem, strip

from lissom.core import NM, Both, Fixed, Grid, GridParams, Sparse, Stack, sweep
from lissom.core.columns import Strip, decide_columns
from lissom.core.two_sided import decide_entries
from lissom.kernels import extension
from lissom.kernels.columns import column_loop, compiled, compiled_entries, entry_loop

pytestmark = pytest.mark.skipif(extension is None, reason="lissom was installed without a compiler")
ISAS = ["", "portable"]
CHECKERED = (torch.arange(150)[:, None] + torch.arange(160)) % 2 == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from(ISAS),
    st.data(),
)
def test_exact_where_numbers_are_exact(rows, span, masked, grid, seed, isa, data):
    begin = data.draw(st.integers(0, span - 1))
    end = data.draw(st.integers(begin + 1, span))
    reach = data.draw(st.integers(end, span))
    a = strip(rows, span, masked, seed, whole_numbers=True)
    b = copied(a)
    params = None
    if grid:
        params = GridParams(torch.full((rows,), 2.0), torch.full((rows,), 3.0), torch.full((rows,), 16.0))
    decide_columns(a, params, begin, min(end, begin + 4), reach)
    compiled(b, params, begin, min(end, begin + 4), reach, isa)
    for name in ("q", "errors", "codes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.w[min(end, begin + 4) :], b.w[min(end, begin + 4) :])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "constraint",
    [
        Sparse(0.7), Sparse(0.5, "row"), NM(2, 4), NM(4, 32), Grid(4, 32), Grid(3, None), Grid(2, 24),
        Both(Sparse(0.6), Grid(4, 64)), Both(NM(2, 4), Grid(4, 128)), Both(Fixed(CHECKERED), Grid(4, 16)),
        Stack(((100, Both(Sparse(0.5), Grid(4, 32))), (50, Both(Sparse(0.8), Grid(3, 32))))),
    ],
)  # fmt: skip
def test_sweeps_agree_up_to_rounding(constraint, isa):
    torch_loop = problem(constraint)
    loop = replace(torch_loop, loop=lambda *a: compiled(*a, isa=isa))
    a, b = sweep(torch_loop, torch_loop.factor()), sweep(loop, loop.factor())
    agree(a, b)


def test_instruction_sets_give_the_same_bytes_in_activation_order():
    p = replace(problem(Grid(4, 32)), loop=compiled)
    factor = p.factor(0.01, True)
    first = sweep(p, factor)
    assert torch.equal(first.weight, sweep(replace(p, loop=lambda *a: compiled(*a, isa="portable")), factor).weight)


def test_not_a_number_stays_so():
    for isa in ISAS:
        s = strip(5, 4, False, 1)
        s.w[0, 2] = float("nan")
        compiled(s, GridParams(torch.ones(5), torch.ones(5), torch.full((5,), 16.0)), 0, 4, 4, isa)
        assert s.q[:, 2].isnan().all() and s.errors[:, 2].isnan().all() and not s.q[:, :2].isnan().any()


def test_other_types_take_the_torch_loop_and_bad_shapes_are_refused():
    assert column_loop() is compiled
    s = strip(3, 4, True, 2)
    double = Strip(*(t.double() if t.is_floating_point() else t for t in (s.w, s.u, s.keep, s.q, s.errors, s.codes)))
    compiled(double, None, 0, 4, 4)
    assert double.q.count_nonzero() == s.keep.count_nonzero()
    with pytest.raises(ValueError, match="span"):
        compiled(replace(s, u=s.u[:2, :2].contiguous()), None, 0, 4, 4)
    with pytest.raises(ValueError, match="range"):
        compiled(s, None, 0, 4, 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.booleans(), st.integers(0, 99), st.sampled_from(ISAS))
def test_entries_exact_where_numbers_are_exact(rows, span, masked, seed, isa):
    a, b = entries(rows, span, masked, seed), entries(rows, span, masked, seed)
    decide_entries(a)
    compiled_entries(b, isa)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.errors, b.errors)
    assert masked or a.codes.unique().numel() > 1 or rows * span < 9


def test_other_types_of_entries_take_the_torch_loop_and_bad_shapes_are_refused():
    assert entry_loop() is compiled_entries
    block = entries(4, 3, True, 0)
    double = replace(block, w=block.w.double(), errors=block.errors.double())
    compiled_entries(double)
    assert bool(double.errors.count_nonzero())
    for name in ("u", "v", "left"):
        with pytest.raises(ValueError, match="span"):
            compiled_entries(replace(block, **{name: getattr(block, name)[:1, :1].contiguous()}))
