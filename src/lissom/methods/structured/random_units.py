"""Random units go: the baseline that every score must beat.

    score_u uniform in [0, 1), drawn by (seed, block, kind)

Source: the random baseline of Michel et al. 2019 (arXiv 1905.10650, §4) and of every paper since. Needs no data.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import UnitProblem


@dataclass(frozen=True)
class RandomUnits:
    """``keep_heads``, ``keep_neurons``: fractions that remain in every block; ``keep_channels`` of the hidden state.

    ``spread``: widths of blocks may differ by so much. ``target``, ``of``: a size that the result must not exceed.
    """

    keep_heads: float = 1.0
    keep_neurons: float = 0.8
    keep_channels: float = 1.0
    spread: float = 0.0
    target: float | None = None
    of: Literal["parameters", "bytes", "latency"] = "parameters"
    seed: int = 0


def random_units(problem: UnitProblem, config: RandomUnits) -> Tensor:
    """Score of every unit, (units,)."""
    mixed = zlib.crc32(f"{config.seed} {problem.block} {problem.units.kind}".encode())
    return torch.rand(problem.units.count, generator=torch.Generator().manual_seed(mixed))
