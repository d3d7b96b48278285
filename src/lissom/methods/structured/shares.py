"""The settings that methods share which remove heads, neurons and channels by score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shares:
    """``keep_heads``, ``keep_neurons``: fractions that remain in every block; ``keep_channels`` of the hidden state.

    ``spread``: widths of blocks may differ by so much. ``target``, ``of``: a size that the result must not exceed.
    """

    keep_heads: float = 1.0
    keep_neurons: float = 0.8
    keep_channels: float = 1.0
    spread: float = 0.0
    target: float | None = None
    of: Literal["parameters", "bytes", "latency"] = "parameters"
