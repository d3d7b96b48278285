"""Whether a tensor is finite, at the speed of reading it."""

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; any shape, floating-point.

    The smallest and the largest element tell it: NaN wins both comparisons. ``isfinite(values).all()`` would make a tensor of
    booleans first.
    """
    if not values.numel():
        return True
    wide = values if values.element_size() > 1 else values.float()  # float8 has no comparison
    low, high = torch.aminmax(wide)
    return bool(torch.isfinite(low) & torch.isfinite(high))
