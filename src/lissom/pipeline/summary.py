"""What a manifest says of the whole: bytes by part before and after, versions of what made it."""

from __future__ import annotations

import platform
import resource
from collections.abc import Sequence
from importlib.metadata import version

from ..models import Model
from .artefact import LayerRecord

_PARTS = {"q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attention"}


def bytes_after(records: Sequence[LayerRecord], total: int) -> dict[str, int]:
    """Bytes of the finished files: attention, MLP, and the rest (embedding, head, norms, headers)."""
    out = {"attention": 0, "mlp": 0}
    for r in records:
        out[_PARTS.get(r.role, "mlp")] += r.bytes
    return out | {"embedding and rest": total - sum(out.values())}


def bytes_before(model: Model, total: int) -> dict[str, int]:
    """The same of the checkpoint, linear layers at its average bytes per weight."""
    out = {"attention": 0.0, "mlp": 0.0}
    each = total / model.parameters_count
    for i in range(model.blocks):
        for layer in model.linears(i):
            out[_PARTS.get(layer.role, "mlp")] += layer.rows * layer.columns * each
    return {k: round(v) for k, v in out.items()} | {"embedding and rest": round(total - sum(out.values()))}


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the numbers."""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "compressed-tensors")},
    }


def peak_memory() -> int:
    """Resident bytes of this process at their highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
