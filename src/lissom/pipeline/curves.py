"""What each choice would cost the model, measured before anything is chosen.

For a layer with outputs y = W x, a change δ of W moves the model's distribution by about (second order, tokens and outputs
taken as independent)

    KL(dense ‖ model) ≈ ½ T² Σ_r E[g_r²] · E[(δ_r x)²]        g = ∂L/∂y of the mean next-token loss L over T predictions

The first factor comes from one backward pass of the dense model, the second – ``Solved.error`` – from really solving the layer
at every (sparsity, bits) of :func:`choices` with one sweep (:func:`lissom.core.sweep`), all choices and all layers of a stage in one
stack. Between the measured sparsities the logarithm of the loss is interpolated. Embedding and head have their loss measured
directly: the KL of the dense blocks between rounded embeddings.

The sweep stands for any solver: ALPS does better at high sparsity than its curve says, rounding to nearest worse.
Source: the empirical Fisher diagonal of OBD (LeCun et al. 1989) applied to outputs instead of weights; ours in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Both, Budget, Factor, Grid, Problem, Stack, Stats, sweep
from ..kernels.columns import column_loop
from ..methods.allocate.spend import Option
from ..models import Linear, Model
from . import gradients
from .data import CalibrationSet, embed
from .layers import constraint_for, wanted
from .planning import CURVE_WEIGHTS
from .prices import (
    EMBEDDING,
    EMBEDDING_BITS,
    SPARSE_BITS,
    SPARSITIES,
    choices,
    embedding_bytes,
    layer_bytes,
    rounded_names,
)
from .recipe import Save, Step
from .stream import stream_block

Tick = Callable[[str, int, int], None]
Options = dict[str, list[Option]]
_STEP = 0.02  # between interpolated sparsities
_WEIGHTS = 40_000_000  # of all choices of a stack that are solved together
_EMBEDDING_WINDOWS = 4
_HEAD_TOKENS = 256


def outer_as_saved(model: Model, save: Save, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything outside of blocks as a reader of the file will get it, fp32 (compare ``Artefact.outer``)."""
    rounded = rounded_names(model) if save.embedding_bits != 16 else []
    out: dict[str, Tensor] = {}
    for name in model.outer_names():
        value = model.checkpoint.tensor(name)
        if name in rounded:
            out[name] = Grid(save.embedding_bits, min(save.embedding_group_size, value.shape[1])).project(value.float())
        else:
            out[name] = value.to(dtype).float() if value.is_floating_point() else value
    return out


@torch.no_grad()
def mean_kl(model: Model, dense: Tensor, hidden: Tensor, outer: Mapping[str, Tensor]) -> float:
    """Mean KL(dense ‖ model), nats a predicted token, of final hidden states (windows, tokens, width) under both heads."""
    total, last = 0.0, hidden.shape[1] - 1
    for g, h in zip(dense, hidden, strict=True):
        for at in range(0, last, _HEAD_TOKENS):
            stop = min(at + _HEAD_TOKENS, last)
            p = torch.log_softmax(model.head(g[None, at:stop])[0].float(), -1)
            q = torch.log_softmax(model.head(h[None, at:stop], outer=outer)[0].float(), -1)
            total += float((p.exp() * (p - q)).sum())
    return total / (len(hidden) * last)


@torch.no_grad()
def embedding_options(
    model: Model, save: Save, held_out: Tensor, dtype: torch.dtype, tick: Tick | None = None
) -> tuple[list[Option], Tensor]:
    """Options of the embedding with their measured KL, and the dense model's final hidden states on ``held_out``."""
    few = held_out[:_EMBEDDING_WINDOWS]
    tables = {b: outer_as_saved(model, replace(save, embedding_bits=b), dtype) for b in EMBEDDING_BITS}
    streams = [torch.cat(embed(model, held_out))] + [torch.cat(embed(model, few, t)) for t in tables.values()]
    for i in range(model.blocks):
        block = model.load_block(i)
        streams = [torch.cat([block.forward(row[None]) for row in h]) for h in streams]
        if tick:
            tick("embedding", i + 1, model.blocks)
    dense = streams[0]
    losses = [mean_kl(model, dense[: len(few)], h, t) for h, t in zip(streams[1:], tables.values(), strict=True)]
    model.release()
    return [
        Option(embedding_bytes(model, save, b), loss, 0.0, b) for b, loss in zip(EMBEDDING_BITS, losses, strict=True)
    ], dense


def layer_options(
    model: Model, step: Step, data: CalibrationSet, samples: int, folder: Path, tick: Tick | None = None
) -> Options:
    """Options of every layer that ``step`` touches; gradients go through ``folder``."""
    ids = data.ids[:samples]
    folder.mkdir(parents=True, exist_ok=True)
    gradients.gather(model, ids, folder, [gradients.OUTPUT_POWER], tick)
    pairs = choices(step.constraint, "zeros" in step.method.makes)
    out: Options = {}
    with torch.no_grad():
        hidden = embed(model, ids)
        model.release()
        for i in range(model.blocks):
            block = model.load_block(i)
            power = gradients.block_extras(folder, i)

            def visit(stage: tuple[Linear, ...], stats: Stats, block: Any = block, power: Any = power) -> None:
                layers = [layer for layer in stage if wanted(layer, step.constraint)]
                weights = {layer.name: block.weight(layer.name) for layer in layers}
                scale = {la.name: power[la.name][gradients.OUTPUT_POWER] * (ids.shape[1] - 1) ** 2 for la in layers}
                if layers:
                    out.update(_curves(layers, weights, scale, stats, step, pairs))

            hidden = stream_block(block, hidden, visit)
            if tick:
                tick("curves", i + 1, model.blocks)
    return out


def _curves(
    layers: Sequence[Linear],
    weights: Mapping[str, Tensor],
    scale: Mapping[str, Tensor],
    stats: Stats,
    step: Step,
    pairs: Sequence[tuple[float, int]],
) -> Options:
    """Solve the layers of one stage at all ``pairs`` and read their curves."""
    W = torch.cat([weights[layer.name] for layer in layers])
    factors: dict[tuple[float, bool], Factor] = {}
    seen: dict[str, dict[tuple[float, int], tuple[float, float]]] = {layer.name: {} for layer in layers}
    each = max(1, CURVE_WEIGHTS // W.numel())
    for at in range(0, len(pairs), each):
        some = pairs[at : at + each]
        parts: list[tuple[int, Both]] = []
        for s, b in some:
            for layer in layers:
                budget = Budget("sparsity", {layer.name: s}, {}, {layer.name: b})
                parts.append((layer.rows, constraint_for(layer, step.constraint, budget)))
        problem = Problem(W.repeat(len(some), 1), stats, Stack(tuple(parts)), (), None, factors, loop=column_loop())
        solved = sweep(problem, problem.factor(getattr(step.config, "damping", 0.01)))
        row = 0
        for pair in some:
            for layer in layers:
                here = slice(row, row + layer.rows)
                loss = float(solved.error[here] @ scale[layer.name])
                seen[layer.name][pair] = (loss, float(torch.count_nonzero(solved.weight[here])))
                row += layer.rows
    return {layer.name: interpolate(layer, step, seen[layer.name]) for layer in layers}


def interpolate(layer: Linear, step: Step, seen: Mapping[tuple[float, int], tuple[float, float]]) -> list[Option]:
    """Options from (sparsity, bits) → (loss, non-zero codes): the measured ones without zeros, and every :data:`_STEP` between."""
    out = [
        Option(layer_bytes(layer, step.constraint, 0.0, b), loss, 0.0, b)
        for (s, b), (loss, _) in seen.items()
        if s == 0
    ]
    if not any(s for s, _ in seen):
        return out
    grid = np.arange(SPARSITIES[0], SPARSITIES[-1] + _STEP / 2, _STEP)
    for b in SPARSE_BITS:
        losses = np.log([max(seen[s, b][0], 1e-30) for s in SPARSITIES])
        counts = [seen[s, b][1] for s in SPARSITIES]
        for s, loss, count in zip(
            grid, np.exp(np.interp(grid, SPARSITIES, losses)), np.interp(grid, SPARSITIES, counts), strict=True
        ):
            sparsity = round(float(s), 4)
            out.append(Option(layer_bytes(layer, step.constraint, sparsity, b, float(count)), float(loss), sparsity, b))
    return out


def tilted(options: Options, depth: Mapping[str, float], tilt: float) -> Options:
    """Losses times e^(−tilt · depth): depth 0 is the first block, 1 the last; the embedding stays as measured."""
    return {
        name: [replace(o, loss=o.loss * float(np.exp(-tilt * depth.get(name, 0.0)))) for o in many]
        for name, many in options.items()
    }


__all__ = [
    "EMBEDDING",
    "Options",
    "embedding_options",
    "interpolate",
    "layer_options",
    "mean_kl",
    "outer_as_saved",
    "tilted",
]
