"""The settings that methods share which remove heads, neurons and channels by score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...core import UnitProblem


@dataclass(frozen=True)
class Widths:
    """``keep_heads``, ``keep_neurons``: fractions that remain in every block.

    ``spread``: widths of blocks may differ by so much; by how much is said by the scores, or, with ``search`` > 0, by
    measuring so many plans. ``target``, ``of``: a size that the result must not exceed.
    """

    keep_heads: float = 1.0
    keep_neurons: float = 0.8
    spread: float = 0.0
    search: int = 0
    target: float | None = None
    of: Literal["parameters", "bytes", "latency"] = "parameters"

    def __post_init__(self) -> None:
        if self.search < 0 or (self.search and not self.spread):
            raise ValueError(
                "search must not be negative, and needs a spread: it looks for widths that differ by block"
            )

    def repair(self, problem: UnitProblem, keep: Tensor) -> dict[str, Tensor]:
        """What makes up for the units that are not in ``keep``: tensors of the layers that read them, by name."""
        return {}


@dataclass(frozen=True)
class Shares(Widths):
    """``keep_channels``: the fraction of the hidden state that remains."""

    keep_channels: float = 1.0
