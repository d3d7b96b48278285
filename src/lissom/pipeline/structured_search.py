"""Predictor search before a structured step: how many units each block keeps, by measured loss instead of by scores.

A plan gives every block a share of units to lose; the mean over blocks stays what the step asks for, kind by kind. In trials the
step's own method chooses the units, which are masked, block by block, and held-out text streams along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Budget, LayerSummary
from ..evaluate import token_losses
from ..models import Block, Model
from ..models.units import KINDS, units_of
from .data import CalibrationSet, embed
from .recipe import Recipe, Step
from .shapes import Shape, full_shape, mean_shape
from .trials import Memory

Tick = Callable[[str, int, int], None]
Counts = dict[str, list[int]]
Choose = Callable[[Block, dict[str, int], list[Tensor], int], list[Tensor]]  # masks the block; its outputs


def search_before(recipe: Recipe, step: Step) -> Step | None:
    """The search written directly before a structured step."""
    at = recipe.steps.index(step)
    before = recipe.steps[at - 1] if at else None
    return before if before is not None and before.method.kind == "allocation" else None


def count_units(wanted: Sequence[float], mean: int, high: int) -> list[int]:
    """Whole numbers near ``wanted``, each from 2 · mean − high to high, that add up to mean · len: largest remainders first."""
    low, total = max(1, 2 * mean - high), mean * len(wanted)
    counts = [min(high, max(low, int(np.floor(w)))) for w in wanted]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        open_ = [i for i, c in enumerate(counts) if low <= c + step <= high]
        best = max(open_, key=lambda i: step * (wanted[i] - counts[i]))
        counts[best] += step
    return counts


def searched_counts(
    model: Model,
    step: Step,
    search: Step,
    shape: Shape,
    data: CalibrationSet,
    folder: Path,
    choose: Choose,
    tick: Tick | None = None,
) -> tuple[Counts, dict[str, Any]]:
    """Units that each block keeps, and how they were found. ``shape``: the widths that are saved, which no block exceeds."""
    full, mean, high = full_shape(model), asdict(mean_shape(model, step)), asdict(shape)
    gone = [kind for kind in KINDS if mean[kind] < full[kind]]
    layers = []
    for i in range(model.blocks):
        block = model.load_block(i)
        for kind in gone:
            size = units_of(block.row, block.config, block.linears, kind).size
            layers.append(LayerSummary(f"{kind} {i}", i, kind, full[kind], size, {}))
    sizes = np.array([layer.size for layer in layers], float)
    shares = np.array([1 - mean[layer.role] / full[layer.role] for layer in layers])
    target = float((shares * sizes).sum() / sizes.sum())

    def counts_of(budget: Budget) -> Counts:
        out = {kind: [mean[kind]] * model.blocks for kind in KINDS}
        for kind in gone:
            lost = np.array([budget.values[f"{kind} {i}"] for i in range(model.blocks)])
            kept = mean[kind] - (lost - lost.mean()) * full[kind]
            out[kind] = count_units(kept.tolist(), mean[kind], high[kind])
        return out

    c = search.config
    few = replace(data, ids=data.ids[: c.trial_samples], held_out=data.held_out[: c.trial_windows])
    memory = Memory(folder.with_name(f"{folder.name}-trials.json"))  # outlives a step that was killed

    @torch.no_grad()
    def loss(counts: Counts, label: str) -> float:
        batches = embed(model, few.ids)
        hidden, watch = batches + embed(model, few.held_out), len(batches)
        for i in range(model.blocks):
            hidden = choose(model.load_block(i), {k: n[i] for k, n in counts.items()}, hidden, watch)
            if tick:
                tick(label, i + 1, model.blocks)
        final = torch.cat(hidden[watch:])
        losses = [token_losses(model, h[None], row).mean() for h, row in zip(final, few.held_out, strict=True)]
        return float(torch.stack(losses).mean())

    def measure(budget: Budget, layers: Sequence[LayerSummary], target: float, label: str) -> float:
        counts = counts_of(budget)
        whole = {f"{k} {i}": float(n) for k, per in counts.items() for i, n in enumerate(per)}
        return memory.recall(Budget("units", whole), lambda: loss(counts, label))

    config = replace(c, spread=min(c.spread, step.config.spread))
    budget = search.method.run(layers, target, config, measure)
    return counts_of(budget), {"search": dict(budget.notes)}
