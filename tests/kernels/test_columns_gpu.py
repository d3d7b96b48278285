"""The sweep's loop for GPUs against its torch definition: on a GPU, or where there is none in Triton's interpreter."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

THERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if THERE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="Triton is for Linux")

from strips import agree, copied, problem, strip  # noqa: E402

from lissom.core import NM, Both, Grid, GridParams, Sparse, Stack, moved, sweep  # noqa: E402
from lissom.core.columns import decide_columns  # noqa: E402
from lissom.kernels import columns  # noqa: E402
from lissom.kernels.columns_gpu import decide_columns as on_gpu  # noqa: E402


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 99), st.data())
def test_exact_where_numbers_are_exact(rows, span, masked, grid, seed, data):
    begin = data.draw(st.integers(0, span - 1))
    end = data.draw(st.integers(begin + 1, min(span, begin + 4)))
    reach = data.draw(st.integers(end, span))
    a = strip(rows, span, masked, seed, whole_numbers=True)
    b = moved(copied(a), THERE)
    params = GridParams(*(torch.full((rows,), v) for v in (2.0, 3.0, 16.0))) if grid else None
    decide_columns(a, params, begin, end, reach)
    on_gpu(b, moved(params, THERE), begin, end, reach)
    for name in ("q", "errors", "codes", "w"):
        assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name


ANY_ORDER = [
    Sparse(0.7), Grid(4, 32), Grid(3, None), Both(Sparse(0.6), Grid(4, 64)),
    Stack(((20, Both(Sparse(0.5), Grid(4, 32))), (30, Both(Sparse(0.8), Grid(3, 32))))),
]  # fmt: skip


@pytest.mark.parametrize(
    "constraint, by_activation", [(NM(2, 4), False), *((c, order) for c in ANY_ORDER for order in (False, True))]
)
def test_sweeps_agree_up_to_rounding(constraint, by_activation):
    here = problem(constraint, rows=50, columns=96)
    there = replace(moved(here, THERE), loop=on_gpu)
    with THERE:
        made = sweep(there, there.factor(0.01, by_activation))
    agree(sweep(here, here.factor(0.01, by_activation)), moved(made, torch.device("cpu")))


def test_halves_round_to_even_and_not_a_number_stays_so():
    s = strip(5, 4, False, 1)
    s.w[0] = torch.tensor([0.5, 1.5, -2.5, float("nan"), float("inf")])
    params = GridParams(torch.ones(5), torch.full((5,), 8.0), torch.full((5,), 16.0))
    t = moved(s, THERE)
    on_gpu(t, moved(params, THERE), 0, 4, 4)
    assert t.q[0, :3].tolist() == [0.0, 2.0, -2.0] and t.q[0, 4] == 7.0
    assert t.q[:, 3].isnan().all() and t.errors[:, 3].isnan().all() and not t.q[:, :3].isnan().any()


def test_other_types_take_the_torch_loop():
    s = strip(3, 4, True, 2)
    double = moved(strip(3, 4, True, 2), THERE)
    double = replace(double, **{k: getattr(double, k).double() for k in ("w", "u", "q", "errors")})
    params = moved(GridParams(torch.ones(3) / 3, torch.full((3,), 8.0), torch.full((3,), 16.0)), THERE)
    on_gpu(double, params, 0, 4, 4)
    decide_columns(s, moved(params, torch.device("cpu")), 0, 4, 4)
    assert double.q.dtype == torch.float64 and torch.allclose(double.q.cpu().float(), s.q, atol=1e-6)


def test_what_cannot_be_built_leaves_the_loop_of_torch(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("lissom.kernels.columns_gpu.decide_columns", broken)
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, ones=torch.ones: ones(*shape))
    columns._gpu_loop.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        assert columns.column_loop(torch.device("cuda")) is decide_columns
    columns._gpu_loop.cache_clear()
