"""What a plan will weigh on disk, before anything is written: matrices by :func:`expected_bytes`, all else exactly or nearly so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import torch

from ..core import Budget
from ..export import LayerPlan, expected_bytes
from ..models import Linear, Model
from .constraints import ConstraintSettings
from .layers import constraint_for
from .sections import Save

EMBEDDING_BITS = (3, 4, 5, 6, 8)
BITS = (2, 3, 4, 5, 6, 8)
SPARSE_BITS = (3, 4, 6)
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)  # below 0.3 the mask costs more than the zeros save
EMBEDDING = "embedding"
_FILE = 150  # of a file: length field, format, part, checksum


def choices(settings: ConstraintSettings, zeros: bool) -> list[tuple[float, int]]:
    """(sparsity, bits) that are measured for every layer."""
    return [(0.0, b) for b in BITS] + [(s, b) for s in SPARSITIES for b in SPARSE_BITS if zeros]


def layer_bytes(
    layer: Linear, settings: ConstraintSettings, sparsity: float, bits: int, nonzeros: float | None = None
) -> float:
    """Bytes of a layer's tensors; ``nonzeros``: weights whose code is not that of zero, by default all that are kept."""
    grid = constraint_for(layer, settings, Budget("sparsity", {layer.name: sparsity}, {}, {layer.name: bits})).grid
    assert grid is not None
    pattern = "unstructured" if sparsity else "dense"
    plan = LayerPlan(layer.name, (layer.rows, layer.columns), pattern, bits, grid.group_size, grid.symmetric)
    local = ["codes", "scale", *(() if grid.symmetric else ("zero",)), *(("counts", "ranks") if sparsity else ())]
    kept = layer.rows * layer.columns * (1 - sparsity) if nonzeros is None else nonzeros
    return expected_bytes(plan, kept) + header_bytes(layer.name, (layer.rows, layer.columns), local)


def rounded_names(model: Model) -> list[str]:
    """The matrices outside of blocks that ``embedding_bits`` rounds."""
    return list(dict.fromkeys(n for n in (model.embed_name, model.head_name) if n))


def embedding_bytes(model: Model, save: Save, bits: int) -> float:
    total = 0.0
    for name in rounded_names(model):
        rows, columns = model.checkpoint.shape(name)
        plan = LayerPlan(name, (rows, columns), "dense", bits, min(save.embedding_group_size, columns))
        total += expected_bytes(plan, rows * columns) + header_bytes(name, (rows, columns), ("codes", "scale", "zero"))
    return total


def fixed_bytes(model: Model, touched: Iterable[Linear], dtype: torch.dtype) -> float:
    """Everything that no choice changes: norms, biases, layers that the recipe leaves alone, and the headers of the files."""
    chosen = {f"{layer.name}.weight" for layer in touched} | set(rounded_names(model))
    rest = [name for name in model.checkpoint.names() if name not in chosen]
    size = sum(math.prod(model.checkpoint.shape(name)) * dtype.itemsize for name in rest)
    return size + sum(map(_entry, rest)) + (model.blocks + 1) * _FILE


def header_bytes(name: str, shape: tuple[int, int], local: Iterable[str]) -> int:
    """Bytes that an encoded matrix takes in the header: its tensors ``local``, and its entry among the layers."""
    local = list(local)
    sparse = len(local) > 3 or "mask" in local
    entry = {
        "bits": 4, "group_size": min(64, shape[1]), "pattern": "unstructured" if sparse else "dense",
        "shape": list(shape), "symmetric": False,
    }  # fmt: skip
    return sum(_entry(f"{name}.{k}") for k in local) + len(json.dumps(json.dumps({name: entry}))) - 2


def _entry(name: str) -> int:
    tensor = {"dtype": "F16", "shape": [100, 1], "data_offsets": [10**4, 10**4]}
    return len(json.dumps({name: tensor}, separators=(",", ":"))) - 3


def limits(
    model: Model, touched: list[Linear], settings: ConstraintSettings, save: Save, zeros: bool, dtype: torch.dtype
) -> tuple[float, float]:
    """The smallest and the largest file that the choices make, bytes."""
    fixed = fixed_bytes(model, touched, dtype)
    sizes = [[layer_bytes(la, settings, s, b) for s, b in choices(settings, zeros)] for la in touched]
    low = fixed + sum(min(s) for s in sizes) + embedding_bytes(model, save, min(EMBEDDING_BITS))
    high = fixed + sum(max(s) for s in sizes) + embedding_bytes(model, save, max(EMBEDDING_BITS))
    return low, high
