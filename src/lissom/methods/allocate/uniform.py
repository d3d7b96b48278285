"""Uniform allocation: every layer gets the target. The baseline of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core import Budget, LayerSummary


@dataclass(frozen=True)
class Uniform:
    """No settings."""


def uniform(layers: Sequence[LayerSummary], target: float, config: Uniform) -> Budget:
    """The same sparsity everywhere."""
    return Budget("sparsity", {layer.name: target for layer in layers})
