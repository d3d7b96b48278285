"""ATP: sparsity rises from block to block in an arithmetic progression.

    s_b = S̄ + spread · (b/(B − 1))^power,   b = 0 … B − 1          S̄ such that the mean is S

Errors of an early block pass through all blocks after it and add up, so early blocks keep more. One number is left to choose,
and a small grid finds it; ``spread: auto`` does that on held-out text.
Source: Huang, Zhang, Zheng, Chao, Ji, ICML 2025 (arXiv 2502.14770; abstract read). Differs: ``power`` below 1
lets the first few blocks keep most of what is given (1 is the paper's progression); the mean is weighted by size and exact after clipping to [S − below, S + above].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core import Budget, LayerSummary
from .budget import bounds, chosen, meet


@dataclass(frozen=True)
class ATP:
    """``spread``: sparsity of the last block minus that of the first, or "auto" among ``spreads``; ``power`` of the depth;
    ``below``/``above``: budgets stay within [S − below, S + above].
    """

    spread: float | Literal["auto"] = 0.2
    power: float = 1.0
    below: float = 0.3
    above: float = 0.2
    spreads: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)


def atp(layers: Sequence[LayerSummary], target: float, config: ATP) -> Budget:
    """The same budget for all layers of a block."""
    spread = chosen(config.spread)
    last = max((layer.block for layer in layers), default=0)
    if spread == 0 or last == 0:
        return Budget("sparsity", {layer.name: target for layer in layers})
    low, high = bounds(target, config.below, config.above)
    wanted = [spread * (layer.block / last) ** config.power for layer in layers]
    values = meet(wanted, [layer.size for layer in layers], target, low, high)
    return Budget("sparsity", {layer.name: v for layer, v in zip(layers, values, strict=True)})
