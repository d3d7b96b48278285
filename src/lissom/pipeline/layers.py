"""Which layers the settings of a step mean, and the constraint that they put on each."""

from __future__ import annotations

import re

from ..core import NM, Both, Budget, Grid, NMByRow, Sparse
from ..models import Linear
from .constraints import ConstraintSettings

ROLES = frozenset({"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"})


def named(expression: str, layer: Linear) -> bool:
    """Whether an entry of ``only`` or ``ignore`` means the layer. A role is never taken as a regular expression, since
    "o" or "q" would be found in nearly every name."""
    return expression == layer.role if expression in ROLES else re.search(expression, layer.name) is not None


def wanted(layer: Linear, settings: ConstraintSettings) -> bool:
    """Whether a step with these settings touches the layer (by role, or by regular expression on the name)."""

    if settings.only and not any(named(e, layer) for e in settings.only):
        return False
    return not any(named(e, layer) for e in settings.ignore)


def constraint_for(layer: Linear, settings: ConstraintSettings, budget: Budget | None) -> Both:
    """The constraint of one layer under its budget."""
    sparsity, bits = settings.sparsity or 0.0, settings.bits
    if budget is not None and layer.name in budget.values:
        if budget.quantity == "bits":
            bits = round(budget.values[layer.name])
        else:
            sparsity = budget.values[layer.name]
            bits = budget.bits.get(layer.name, bits)
    pattern: Sparse | NM | NMByRow | None = None
    if settings.nm:
        n, m = settings.nm
        pattern = NM(n, m) if n < m else None
    elif settings.free_m:
        n = round((1 - sparsity) * settings.free_m)
        pattern = NM(max(n, 1), settings.free_m) if n < settings.free_m else None
    elif settings.row_m and sparsity > 0:
        pattern = NMByRow(sparsity, settings.row_m)
    elif sparsity > 0:
        pattern = Sparse(sparsity, "row" if settings.per == "row" else "layer", settings.shape or (1, 1))
    grid = None
    if bits != 16:
        size = settings.group_size or None
        grid = Grid(bits, None if size is None or size >= layer.columns else size, settings.symmetric, settings.range)
    return Both(pattern, grid)
