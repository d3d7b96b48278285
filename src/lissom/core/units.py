"""Removable units of a block: everything that must go together, so that what remains is an ordinary smaller block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .place import moved
from .stats import Stats


@dataclass(frozen=True)
class Units:
    """All units of one ``kind`` ("heads": a KV group with its query heads; "neurons": of the MLP; "channels": of the hidden
    state, which all blocks share) in one block.

    ``rows``: layer name → (units, k) outputs of that layer that belong to each unit, with their biases; ``columns``: layer
    name → (units, k) inputs. ``size``: weights that one unit takes away. Indices are into weights (out, in).
    """

    kind: str
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    size: int

    @property
    def count(self) -> int:
        return len(next(iter(self.columns.values())))

    def to(self, device: str | torch.device) -> Units:
        """The same with indices on ``device``."""
        return moved(self, torch.device(device))

    def reduce(self, values: Mapping[str, Tensor]) -> Tensor:
        """Sum over each unit of the entries of ``values`` (layer name → (out, in)), (units,). Missing layers add nothing."""
        total = torch.zeros(self.count)
        for name, index in self.rows.items():
            if name in values:
                total += values[name].sum(1)[index].sum(1)
        for name, index in self.columns.items():
            if name in values:
                total += values[name].sum(0)[index].sum(1)
        return total


@dataclass(frozen=True)
class UnitProblem:
    """What a structured method knows of one kind of units of one block.

    ``weights``: layer name → (out, in) fp32. ``inputs``: statistics of the inputs of the layers in ``units.columns``.
    ``gradients``: layer name → (samples, out, in), of the loss of each sample; ``output_grams``: layer name → (out, out), E[g gᵀ]
    of the gradients at its outputs; both empty unless the method needs them.
    """

    units: Units
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Stats] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    output_grams: Mapping[str, Tensor] = field(default_factory=dict)
    block: int = 0


@dataclass(frozen=True)
class GateProblem:
    """What a method sees of the learned gates of a whole model while they are trained.

    ``open``: kind → P(gate ≠ 0), differentiable: "heads" and "neurons" (blocks, units), "blocks" (blocks,), "channels"
    (width,); only kinds that have gates. ``keep``: kind → fraction that is to remain. ``size``: kind → weights of one unit.
    ``progress``: of the training, in [0, 1].
    """

    open: Mapping[str, Tensor]
    keep: Mapping[str, float]
    size: Mapping[str, int] = field(default_factory=dict)
    progress: float = 1.0
