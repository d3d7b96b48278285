"""`is_finite` beside the naive ``isfinite(values).all()``: every dtype, every place of a bad element."""

import pytest
import torch

from lissom.core import is_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 7, 33, 1000])
def test_a_bad_element_is_seen_wherever_it_is(dtype: torch.dtype, bad: float, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert is_finite(values.to(dtype))
    for at in sorted({0, size // 3, size - 1}):
        spoilt = values.clone()
        spoilt[at] = bad
        spoilt = spoilt.to(dtype)
        assert is_finite(spoilt) == bool(torch.isfinite(spoilt.float()).all())
        if bad != bad or dtype != torch.float8_e4m3fn:  # which has no infinity
            assert not is_finite(spoilt)


def test_the_largest_finite_values_and_the_empty_tensor_are_finite() -> None:
    for dtype in FLOATS[:4]:
        top = torch.finfo(dtype).max
        assert is_finite(torch.tensor([top, -top, top, -top], dtype=dtype))
    assert is_finite(torch.empty(0, 3))
    assert not is_finite(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]).T)
