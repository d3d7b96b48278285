"""How many units each block keeps when they may differ: scores, standardised block by block, compete over all blocks.

    z_u = (score_u − mean of the block) / standard deviation of the block

Source: FLAP's adaptive structure (arXiv 2312.11983, §4.2, "AL-AM"). The mean over blocks is exact, no block keeps more than
``high`` nor less than ``2 · mean − high`` units.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widths(scores: Tensor, mean: int, high: int) -> list[int]:
    """Units that each block keeps, from ``scores`` (blocks, units)."""
    blocks, count = scores.shape
    low = max(1, 2 * mean - high)
    z = scores.double()
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True).clamp_min(1e-300)
    ranked = z.sort(dim=1, descending=True).values
    ranked[:, :low] = torch.inf  # in any case
    ranked[:, high:] = -torch.inf
    taken = ranked.flatten().argsort(descending=True, stable=True)[: mean * blocks]
    return torch.bincount(taken // count, minlength=blocks).tolist()
