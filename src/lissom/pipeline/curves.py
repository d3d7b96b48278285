"""What each choice would cost the model, measured before anything is chosen.

For a layer with outputs y = W x, a change δ of W moves the model's distribution by about (second order, tokens and outputs
taken as independent)

    KL(dense ‖ model) ≈ ½ T² Σ_r E[g_r²] · E[(δ_r x)²]        g = ∂L/∂y of the mean next-token loss L over T predictions

The first factor comes from one backward pass of the dense model, the second – ``Solved.error`` – from really solving the layer
at every (sparsity, bits) of :func:`choices` with one sweep (:func:`lissom.core.sweep`), all choices and all layers of a stage in one
stack. Between the measured sparsities the logarithm of the loss is interpolated. Embedding and head have their loss measured
directly: the KL of the dense blocks between rounded embeddings.

The sweep stands for any solver at first: ALPS loses less at high sparsity, rounding to nearest more. So in a few blocks the
recipe's own steps solve every layer too, at the choices of ``SPARSE_CHECKED`` and all dense ones, and the mean ratio of the
losses, by role and choice, is applied to all blocks.
Source: the empirical Fisher diagonal of OBD (LeCun et al. 1989) applied to outputs instead of weights; ours in this form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import HOST, Both, Budget, Factor, Grid, Problem, Stack, Stats, sweep
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
from .recipe import Recipe, Step
from .sections import Save
from .stream import solve_stage, stream_block
from .target import parts
from .workdir import dump_json

Tick = Callable[[str, int, int], None]
Options = dict[str, list[Option]]
Pair = tuple[float, int]  # sparsity, bits
Curve = dict[Pair, tuple[float, float]]  # → loss, non-zero codes
_STEP = 0.02  # between interpolated sparsities
_WEIGHTS = 40_000_000  # of all choices of a stack that are solved together
_EMBEDDING_WINDOWS = 4
_HEAD_TOKENS = 256
SPARSE_CHECKED = (0.5, 0.8)
_CHECKED_BLOCKS = (0.1, 0.5, 0.9)  # where in the depth


@dataclass
class Measured:
    """What one block's layers measured: ``curves`` of the sweep; ``own``: losses of the recipe's own steps, where they ran."""

    curves: dict[Linear, Curve] = field(default_factory=dict)
    own: dict[Linear, dict[Pair, float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {
            "curves": {la.name: [[*pair, *seen] for pair, seen in c.items()] for la, c in self.curves.items()},
            "own": {la.name: [[*pair, loss] for pair, loss in c.items()] for la, c in self.own.items()},
        }

    @classmethod
    def read(cls, data: Mapping[str, Any], layers: Sequence[Linear]) -> Measured:
        named = {la.name: la for la in layers}
        return cls(
            {named[n]: {(s, b): (loss, count) for s, b, loss, count in c} for n, c in data["curves"].items()},
            {named[n]: {(s, b): loss for s, b, loss in c} for n, c in data["own"].items()},
        )


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
    model: Model, recipe: Recipe, data: CalibrationSet, samples: int, folder: Path, tick: Tick | None = None
) -> Options:
    """Options of every layer that the recipe's solvers touch; gradients go through ``folder``, and so does what each block
    measured: a killed run forwards the blocks that it finds there, and solves nothing of them again.
    """
    ids = data.ids[:samples]
    folder.mkdir(parents=True, exist_ok=True)
    exponent = recipe.calibration.token_fisher
    read = [gradients.OUTPUT_POWER] + ([gradients.TOKEN_WEIGHT] if exponent else [])
    gradients.gather(model, ids, folder, read, tick, exponent)
    zeros, codes = parts(recipe.steps)
    step = recipe.steps[codes]
    pairs = choices(step.constraint, zeros is not None)
    checked = [pair for pair in pairs if not pair[0] or pair[0] in SPARSE_CHECKED]
    own = {round((model.blocks - 1) * f) for f in _CHECKED_BLOCKS}
    measured: list[Measured] = []
    with torch.no_grad():
        hidden = embed(model, ids)
        model.release()
        for i in range(model.blocks):
            block, path = model.load_block(i), folder / f"curves-{i}.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            found = Measured.read(known, block.linears) if known else Measured()
            power = gradients.block_extras(folder, i)

            def visit(
                stage: tuple[Linear, ...], stats: Stats, block: Any = block, power: Any = power, found: Measured = found
            ) -> None:
                layers = [layer for layer in stage if wanted(layer, step.constraint)]
                weights = {layer.name: block.weight(layer.name) for layer in layers}
                scale = {la.name: power[la.name][gradients.OUTPUT_POWER] * (ids.shape[1] - 1) ** 2 for la in layers}
                if layers:
                    found.curves |= _curves(layers, weights, scale, stats, step, pairs)
                    for pair in checked if block.number in own else ():
                        for la, loss in _really(layers, weights, scale, stats, recipe, pair, power).items():
                            found.own.setdefault(la, {})[pair] = loss

            act, watch = (visit, None) if known is None else (_pass, 0)
            hidden = stream_block(block, hidden, act, watch=watch, extras=power)
            if known is None:
                dump_json(path, found.plain())
            measured.append(found)
            if tick:
                tick("curves", i + 1, model.blocks)
    ratios: dict[tuple[str, Pair], list[float]] = {}
    for found in measured:
        for la, losses in found.own.items():
            for pair, loss in losses.items():
                ratio = math.log(max(loss, 1e-30) / max(found.curves[la][pair][0], 1e-30))
                ratios.setdefault((la.role, pair), []).append(ratio)
    return {
        la.name: interpolate(la, step, _corrected(la, curve, ratios))
        for m in measured
        for la, curve in m.curves.items()
    }


def _pass(stage: tuple[Linear, ...], stats: Stats) -> None:
    """Nothing to measure here."""


def _curves(
    layers: Sequence[Linear],
    weights: Mapping[str, Tensor],
    scale: Mapping[str, Tensor],
    stats: Stats,
    step: Step,
    pairs: Sequence[Pair],
) -> dict[Linear, Curve]:
    """Sweep the layers of one stage at all ``pairs`` and read their curves."""
    W = torch.cat([weights[layer.name] for layer in layers])
    factors: dict[tuple[float, bool], Factor] = {}
    seen: dict[Linear, Curve] = {layer: {} for layer in layers}
    each = max(1, CURVE_WEIGHTS // W.numel())
    for at in range(0, len(pairs), each):
        some = pairs[at : at + each]
        stacked: list[tuple[int, Both]] = []
        for s, b in some:
            for layer in layers:
                budget = Budget("sparsity", {layer.name: s}, {}, {layer.name: b})
                stacked.append((layer.rows, constraint_for(layer, step.constraint, budget)))
        loop = column_loop(W.device)
        problem = Problem(W.repeat(len(some), 1), stats, Stack(tuple(stacked)), (), None, factors, loop=loop)
        solved = sweep(problem, problem.factor(getattr(step.config, "damping", 0.01)))
        row = 0
        for pair in some:
            for layer in layers:
                here = slice(row, row + layer.rows)
                loss = float(solved.error[here].to(HOST) @ scale[layer.name])
                seen[layer][pair] = (loss, float(torch.count_nonzero(solved.weight[here])))
                row += layer.rows
    return seen


def _really(
    layers: Sequence[Linear],
    weights: Mapping[str, Tensor],
    scale: Mapping[str, Tensor],
    stats: Stats,
    recipe: Recipe,
    pair: Pair,
    extras: Mapping[str, Mapping[str, Tensor]],
) -> dict[Linear, float]:
    """Losses of the layers as the recipe's own steps solve them."""
    sparsity, bits = pair
    budgets = budgets_of({la.name: Option(0.0, 0.0, sparsity, bits) for la in layers}, parts(recipe.steps))
    steps = [(s, budgets.get(i)) for i, s in enumerate(recipe.steps) if s.method.kind == "solver"]
    results = solve_stage(layers, weights, stats, steps, extras)
    return {r.layer: float(r.solved.error @ scale[r.layer.name]) for r in results}


def _corrected(layer: Linear, curve: Curve, ratios: Mapping[tuple[str, Pair], Sequence[float]]) -> Curve:
    """The curve times the mean ratio of its role, which is interpolated over sparsity and constant beyond what was checked."""
    mean = {pair: sum(r) / len(r) for (role, pair), r in ratios.items() if role == layer.role}
    out: Curve = {}
    for (s, b), (loss, count) in curve.items():
        if s == 0:
            ratio = mean.get((0.0, b), 0.0)
        else:
            known = {c: mean[c, b] for c in SPARSE_CHECKED if (c, b) in mean}
            ratio = float(np.interp(s, list(known), list(known.values()))) if known else 0.0
        out[s, b] = (loss * math.exp(ratio), count)
    return out


def interpolate(layer: Linear, step: Step, seen: Curve) -> list[Option]:
    """Options from a curve: the measured ones without zeros, and every :data:`_STEP` between."""
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


def budgets_of(choice: Mapping[str, Option], places: tuple[int | None, int]) -> dict[int, Budget]:
    """By position of the step: one budget when one step makes zeros and codes, else one of each."""
    sparsity, bits = {n: o.sparsity for n, o in choice.items()}, {n: o.bits for n, o in choice.items()}
    zeros, codes = places
    if zeros is None or zeros == codes:
        return {codes: Budget("sparsity", sparsity, {}, bits)}
    return {zeros: Budget("sparsity", sparsity), codes: Budget("bits", {n: float(b) for n, b in bits.items()})}


def tilted(options: Options, depth: Mapping[str, float], tilt: float) -> Options:
    """Losses times e^(−tilt · depth): depth 0 is the first block, 1 the last; the embedding stays as measured."""
    return {
        name: [replace(o, loss=o.loss * float(np.exp(-tilt * depth.get(name, 0.0)))) for o in many]
        for name, many in options.items()
    }


__all__ = [
    "EMBEDDING",
    "Options",
    "budgets_of",
    "embedding_options",
    "interpolate",
    "layer_options",
    "mean_kl",
    "outer_as_saved",
    "tilted",
]
