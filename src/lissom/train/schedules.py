"""Schedules: what changes over the time of a training. All are functions of ``progress`` in [0, 1] and nothing else."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def rate(progress: float, warmup: float = 0.05, shape: Shape = "cosine", floor: float = 0.0) -> float:
    """Factor of the learning rate: up linearly until ``warmup``, then down to ``floor`` as a half cosine or a line."""
    if warmup > 0 and progress < warmup:
        return progress / warmup
    left = min(max((progress - warmup) / max(1 - warmup, 1e-12), 0.0), 1.0)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * left)), "linear": 1 - left, "constant": 1.0}[shape]
    return floor + (1 - floor) * fall


def cubic(progress: float, target: float, initial: float = 0.0, start: float = 0.0, stop: float = 1.0) -> float:
    """Sparsity s_f + (s_i − s_f)(1 − t)³ between ``start`` and ``stop`` (Zhu & Gupta 2017, arXiv 1710.01878)."""
    t = min(max((progress - start) / max(stop - start, 1e-12), 0.0), 1.0)
    return target + (initial - target) * (1 - t) ** 3


def rewound(progress: float, to: float) -> float:
    """Learning-rate rewinding (Renda et al. 2020, arXiv 2003.02389): retraining runs the schedule again from ``to`` on."""
    return to + (1 - to) * progress
