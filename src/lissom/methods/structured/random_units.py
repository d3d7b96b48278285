"""Random units go: the baseline that every score must beat.

    score_u uniform in [0, 1), drawn by (seed, block, kind)

Source: the random baseline of Michel et al. 2019 (arXiv 1905.10650, §4) and of every paper since. Needs no data.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import HOST, UnitProblem
from .shares import Shares


@dataclass(frozen=True)
class RandomUnits(Shares):
    """``seed`` of the scores."""

    seed: int = 0


def random_units(problem: UnitProblem, config: RandomUnits) -> Tensor:
    """Score of every unit, (units,)."""
    mixed = zlib.crc32(f"{config.seed} {problem.block} {problem.units.kind}".encode())
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(problem.units.count, generator=generator, device=HOST)
