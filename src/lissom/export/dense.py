"""Dense safetensors: ``weight`` in the artefact's dtype, zeros stored as zeros. Every tool loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core import FormatError, Solved
from .layout import LayerPlan, Layout, StoredLayer, describe, need, shape_of, stored_values


class Dense:
    """Holds every recipe and shrinks nothing. Rounds quantized weights once, to the artefact's dtype."""

    name = "dense"
    reader = "transformers"

    def encode(self, solved: Solved, layout: Layout) -> dict[str, Tensor]:
        weight = stored_values(solved.weight, layout.dtype)
        return {"weight": (weight.T if layout.transposed else weight).contiguous()}

    def entry(self, solved: Solved, layout: Layout) -> dict[str, Any]:
        return describe(solved, layout)

    def decode(self, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> StoredLayer:
        (weight,) = need(tensors, "weight")
        weight = weight.float()
        weight = (weight.T if entry.get("transposed") else weight).contiguous()
        if tuple(weight.shape) != shape_of(entry):
            raise FormatError(f"the weight has shape {tuple(weight.shape)}, the configuration says {entry['shape']}")
        pattern = entry["pattern"]
        return StoredLayer(None, None if pattern == "dense" else weight != 0, pattern, weight)

    def check(self, layer: LayerPlan) -> list[str]:
        return []

    def advice(self, layer: LayerPlan) -> list[str]:
        if layer.bits is None and layer.pattern == "dense":
            return []
        return [f"{layer.name}: format dense stores zeros and rounded weights in full; the file does not get smaller"]

    def config(self, entries: Mapping[str, Mapping[str, Any]], layout: Layout) -> dict[str, Any] | None:
        return None
