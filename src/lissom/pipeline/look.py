"""What a checkpoint is, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..export import CODECS, open_model
from ..methods import METHODS
from ..models import Model


def inspect(source: str | Path) -> dict[str, Any]:
    """Architecture, linear layers by shape, bytes, and what can be done with the checkpoint."""
    checkpoint = open_model(source)
    model = Model(checkpoint)
    groups: dict[tuple, dict[str, Any]] = {}
    for i in range(model.blocks):
        for layer in model.linears(i):
            key = (layer.role, layer.rows, layer.columns)
            row = {"role": layer.role, "count": 0, "shape": [layer.rows, layer.columns], "stage": layer.stage}
            groups.setdefault(key, row)["count"] += 1
    parameters = model.parameters_count
    return {
        "model": str(source),
        "format": checkpoint.format,
        "architecture": model.architecture.name,
        "model_type": model.config.model_type,
        "parameters": parameters,
        "bytes": checkpoint.bytes,
        "bits_per_weight": 8 * checkpoint.bytes / parameters,
        "blocks": model.blocks,
        "dtype": str(checkpoint.dtype(model.embed_name)).removeprefix("torch."),
        "has_head": model.has_head,
        "tied": model.tied,
        "layers": list(groups.values()),
        "prunable_weights": sum(r["count"] * r["shape"][0] * r["shape"][1] for r in groups.values()),
        "supported": sorted(m.name for m in METHODS.values()),
        "formats": sorted(CODECS),
    }
