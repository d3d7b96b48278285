"""ShortGPT: whole blocks that hardly turn the hidden state go.

    BI_l = 1 − E[cos(x_l, x_{l+1})]        x_l: hidden state that enters block l

Source: Men et al. 2024 (arXiv 2403.03853), eq. 1; methods/03 §19. One forward pass. Depth is the only thing that changes,
so every architecture can do it, and every engine runs the result faster by the same share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ShortGPT:
    """``keep_blocks``: fraction of the blocks that remain."""

    keep_blocks: float = 0.8


def influence(before: Tensor, after: Tensor) -> float:
    """BI of one block: hidden states before and after it, (…, width)."""
    return 1 - float(F.cosine_similarity(before.double(), after.double(), dim=-1).mean())


def shortgpt(influences: list[float], config: ShortGPT) -> list[int]:
    """The blocks that remain, in order; of equal influences the first ones stay."""
    count = max(1, round(config.keep_blocks * len(influences)))
    order = torch.tensor(influences, dtype=torch.float64).argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())
