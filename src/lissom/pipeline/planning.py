"""Everything up to the first weight: which layer gets what, what it will take, and all mistakes at once."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core import RecipeError
from ..export import LayerPlan, codec_named
from ..models import Linear, Model
from .folding import fold_problems
from .gradients import DO_WITHOUT, gradient_tokens, gram_numbers, wanted_extras
from .layers import named, wanted
from .operating import operator_advice, operator_problems, operators_of
from .recipe import TRAINED, Recipe, Step

_PYTHON_AND_TORCH = 700 << 20  # resident bytes of an idle process with torch and transformers loaded
CURVE_WEIGHTS = 20_000_000  # of all choices of a stage that are solved together when curves are measured
_UNIT = 32  # a shorter last quantization group must still be whole units of this many inputs


@dataclass(frozen=True)
class Pass:
    """Steps that run together while blocks stream by once: an optional allocation and its solvers."""

    solvers: tuple[Step, ...]
    allocations: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """``passes`` in order; ``layers`` rows for people; estimates in bytes and seconds; ``warnings``; ``target``: what a recipe
    with a target chose and expects, once measured."""

    recipe: Recipe
    passes: tuple[Pass, ...]
    layers: tuple[dict[str, Any], ...]
    model: dict[str, Any]
    estimates: dict[str, float]
    warnings: tuple[str, ...] = field(default=())
    target: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        return ({"target": self.target} if self.target else {}) | {
            "recipe": self.recipe.describe(),
            "model": self.model,
            "estimates": self.estimates,
            "warnings": list(self.warnings),
            "layers": list(self.layers),
        }


def passes_of(recipe: Recipe) -> tuple[Pass, ...]:
    """All solver steps form one pass over the blocks: each layer goes through the whole chain."""
    allocations = tuple(s for s in recipe.steps if s.method.kind == "allocation")
    solvers = tuple(s for s in recipe.steps if s.method.kind == "solver")
    return (Pass(solvers, allocations),) if solvers else ()


def allocation_for(recipe: Recipe, solver: Step) -> Step | None:
    """The allocation written directly before ``solver``."""
    index = recipe.steps.index(solver)
    before = recipe.steps[index - 1] if index else None
    return before if before is not None and before.method.kind == "allocation" else None


def make_plan(model: Model, recipe: Recipe, out: Path | None = None, calibration_tokens: int | None = None) -> Plan:
    """Resolve ``recipe`` against ``model``. Raises :class:`RecipeError` that lists every problem."""
    problems: list[str] = []
    warnings: list[str] = []
    layers = [layer for i in range(model.blocks) for layer in model.linears(i)]
    solvers = [s for s in recipe.steps if s.method.kind == "solver"]
    for step in solvers:
        problems += _misfits(step, layers, warnings)
    for setting, given in (
        ("row_fisher", any(s.constraint.row_fisher for s in solvers)), ("token_fisher", recipe.calibration.token_fisher),
    ):  # fmt: skip
        if given and not model.has_head:
            warnings.append(
                f"{setting}: the model has no head, so there is no loss to take gradients of: it has no effect"
            )
    if not model.has_head:
        warnings += [
            f"{s.name}: the model has no head, so there is no loss to take gradients of: its outputs count alike"
            for s in solvers
            if s.name in DO_WITHOUT
        ]
    problems += fold_problems(model, recipe, warnings)
    problems += operator_problems(model, recipe)
    warnings += operator_advice(recipe, operators_of(model, recipe))
    trained = [s for s in recipe.steps if s.method.kind == "training"]
    if trained and recipe.save.format == "dense" and any(s.constraint.bits != 16 for s in solvers):
        problems.append(
            f"{trained[0].name}: format dense keeps no grid, so training would leave it; save as packed or compressed-tensors"
        )
    stored = getattr(model.checkpoint, "format", "dense")
    if trained and not solvers and stored not in ("dense", "planned"):
        kept = stored == "packed" and all(s.method.kind in ("training", "operator") for s in recipe.steps)
        kept = kept and not any("form" in entry for entry in getattr(model.checkpoint, "entries", {}).values())
        if not kept:
            problems.append(
                f"{trained[0].name}: {model.checkpoint.source} is stored as {stored}, whose masks and grids would be lost by "
                "training alone; start from the dense model and put the training into the recipe that compressed it"
            )
        elif recipe.save.format != stored:
            problems.append(
                f"{trained[0].name}: {model.checkpoint.source} is stored as {stored}; save as {stored} too (format={stored}), "
                "so that its masks and grids stay"
            )
    positions, length = getattr(model.config, "max_position_embeddings", None), recipe.calibration.length
    if positions and length > positions:
        text = f"calibration: samples of {length} tokens are longer than the {positions} positions of the model"
        (problems if model.architecture.embed_positions else warnings).append(f"{text}; set length={positions}")
    rows = [_row(layer, solvers) for layer in layers]
    prunable = sum(layer.rows * layer.columns for layer in layers)
    zeros = sum(r["weights"] * r["sparsity"] for r in rows)
    estimates = estimate(model, recipe, layers, calibration_tokens or _tokens(recipe))
    if out is not None:
        free = shutil.disk_usage(_existing(out)).free
        if estimates["disk_bytes"] > free:
            problems.append(
                f"the disk of {out} has {free / 1e9:.1f} GB free, the run needs about {estimates['disk_bytes'] / 1e9:.1f} GB"
            )
    codec = codec_named(recipe.save.format)
    stored = [_stored_as(layer, solvers, model.architecture.transposed) for layer in layers]
    problems += _together(line for plan in stored for line in codec.check(plan))
    warnings += _together(line for plan in stored for line in codec.advice(plan))
    if problems:
        raise RecipeError(problems)
    facts = {
        "architecture": model.architecture.name,
        "blocks": model.blocks,
        "linear_layers": len(layers),
        "parameters": model.parameters_count,
        "prunable_weights": prunable,
        "planned_sparsity": zeros / max(prunable, 1),
    }
    return Plan(recipe, passes_of(recipe), tuple(rows), facts, estimates, tuple(warnings))


def _misfits(step: Step, layers: list[Linear], warnings: list[str]) -> Iterator[str]:
    c = step.constraint
    touched = [layer for layer in layers if wanted(layer, c)]
    for expression in (*c.only, *c.ignore):
        if not any(named(expression, layer) for layer in layers):
            roles = ", ".join(dict.fromkeys(layer.role for layer in layers))
            yield f"{step.name}: {expression!r} matches no layer of this model (roles: {roles}; first name: {layers[0].name})"
    if not touched:
        yield f"{step.name}: no layer is left to work on"
    m = c.group
    if m:
        bad = [layer for layer in touched if layer.columns % m]
        if bad:
            yield (
                f"{step.name}: pattern {c.pattern} does not divide the {bad[0].columns} inputs of {bad[0].name}"
                + _more(bad)
            )
    r, k = c.shape or (1, 1)
    bad = [layer for layer in touched if c.prunes and (layer.rows % (r or 1) or layer.columns % (k or 1))]
    if bad:
        yield (
            f"{step.name}: unit {c.unit} does not divide the {bad[0].rows} x {bad[0].columns} weights of {bad[0].name}"
            + _more(bad)
        )
    if c.bits != 16 and c.group_size:
        bad = [la for la in touched if c.group_size < la.columns and la.columns % c.group_size % _UNIT]
        if bad:
            columns = bad[0].columns
            options = [g for g in (16, 32, 64, 128, 256) if columns % g % _UNIT == 0 or columns % g == 0]
            yield (
                f"{step.name}: group_size {c.group_size} does not divide the {columns} inputs of {bad[0].name}"
                + _more(bad)
                + (f"; possible: {', '.join(map(str, options))}, or 0 for one scale per row" if options else "")
            )
        short = [la for la in touched if la not in bad and c.group_size < la.columns and la.columns % c.group_size]
        if short:
            rest = short[0].columns % c.group_size
            warnings.append(
                f"{step.name}: group_size {c.group_size} does not divide {short[0].columns} inputs "
                f"({len(short)} layers): their last group holds {rest}"
            )


def _stored_as(layer: Linear, solvers: list[Step], transposed: bool) -> LayerPlan:
    """The layer as the codec will get it, at the recipe's average sparsity."""
    pattern, bits, size, symmetric, form = "dense", None, None, False, None
    for step in solvers:
        c = step.constraint
        if wanted(layer, c):
            if c.prunes:
                pattern = c.pattern if c.nm else f"n:{c.row_m}" if c.row_m else "unstructured"
            if c.bits != 16:
                bits, symmetric = c.bits, c.symmetric
                size = c.group_size if 0 < c.group_size < layer.columns else None
                form = getattr(step.config, "table", step.name) if "forms" in step.method.makes else None
    return LayerPlan(layer.name, (layer.rows, layer.columns), pattern, bits, size, symmetric, transposed, form=form)


def _together(lines: Iterable[str]) -> list[str]:
    """Lines "layer: message" with the layers of equal messages counted instead of listed."""
    layers: dict[str, list[str]] = {}
    for line in lines:
        name, _, message = line.partition(": ")
        layers.setdefault(message, []).append(name)
    return [
        f"{names[0]}{f' (and {len(names) - 1} more layers)' if len(names) > 1 else ''}: {message}"
        for message, names in layers.items()
    ]


def _more(layers: list[Linear]) -> str:
    return f" (and {len(layers) - 1} more layers)" if len(layers) > 1 else ""


def _row(layer: Linear, solvers: list[Step]) -> dict[str, Any]:
    sparsity, bits, names = 0.0, 16, []
    for step in solvers:
        if wanted(layer, step.constraint):
            names.append(step.name)
            if step.constraint.prunes:
                sparsity = step.constraint.target
            bits = step.constraint.bits if step.constraint.bits != 16 else bits
    return {
        "name": layer.name,
        "block": layer.block,
        "role": layer.role,
        "shape": [layer.rows, layer.columns],
        "weights": layer.rows * layer.columns,
        "steps": names,
        "sparsity": sparsity,
        "bits": bits,
    }


def _tokens(recipe: Recipe) -> int:
    return recipe.calibration.samples * recipe.calibration.length


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@functools.cache
def matmul_speed(seconds: float = 0.2) -> float:
    """Multiply-adds per second of this machine in fp32, measured."""
    a, b = torch.randn(512, 768), torch.randn(768, 768)
    torch.matmul(a, b)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.matmul(a, b)
        count += 1
    return count * 512 * 768 * 768 / (time.perf_counter() - start)


def estimate(model: Model, recipe: Recipe, layers: list[Linear], tokens: int) -> dict[str, float]:
    """Rough bytes and seconds: peak memory, disk while running, size of the result, wall time."""
    by_block = [[la for la in layers if la.block == i] for i in range(model.blocks)]
    largest = max((sum(la.rows * la.columns for la in block) for block in by_block), default=0)
    widest = max((la.columns for la in layers), default=0)
    hidden = model.config.hidden_size
    outer = max((_numel(model.checkpoint.shape(n)) for n in model.outer_names()), default=0)
    activations = 4 * tokens * (2 * hidden + widest)
    gram = 5 * 4 * widest * widest
    epochs = [getattr(s.config, "epochs", 1) for s in recipe.steps if s.method.kind == "block"]
    if epochs:  # a second stream with its targets; latent weights, two moments, the best so far
        activations += 4 * tokens * 3 * hidden
        gram += 4 * 4 * largest
    drift = bool(recipe.calibration.drift)
    if drift:  # a second stream, and what both give together
        activations += 4 * tokens * (2 * hidden + widest)
        gram += 2 * 4 * widest * widest
    extras = wanted_extras(recipe, model.has_head)
    # bytes of the gradients' Gram matrices of each block, which wait on disk
    outputs = [4 * sum(gram_numbers(la.rows, extras) for la in block) for block in by_block]
    gram += 4 * max(outputs, default=0)  # as read, stacked, and a factor
    memory = _PYTHON_AND_TORCH + max(4 * 3 * largest + activations + gram, 3 * 4 * outer)
    weights = sum(la.rows * la.columns for la in layers)
    bits = _bits_per_weight(recipe)
    rest = max(model.parameters_count - weights, 0)
    outer_bits = 16 if recipe.save.embedding_bits == 16 else recipe.save.embedding_bits + 0.3
    size = weights * bits / 8 + rest * outer_bits / 8
    needs_gram = any("gram" in s.method.needs for s in recipe.steps)
    per_token = weights + (0.62 * sum(la.columns**2 for la in _inputs(layers)) if needs_gram else 0)
    if drift:
        per_token += weights + sum(la.columns**2 for la in _inputs(layers))
    shots = max((s.constraint.shots for s in recipe.steps), default=1)
    share = float(shots)
    if any(s.method.kind == "allocation" and s.method.needs for s in recipe.steps):
        share += shots * allocation_samples(recipe) / recipe.calibration.samples
    sweeps = sum(la.columns * 2.0e-4 + la.rows * la.columns**2 / 4e10 for la in layers) if needs_gram else 0
    sweeps *= shots
    if recipe.target:  # forwards and backwards of the curves, and one trial for each tilt
        memory += 6 * 4 * CURVE_WEIGHTS
        trials = len(recipe.target.tilts)
        share += (6 + 2 * trials) * allocation_samples(recipe) / recipe.calibration.samples
        sweeps *= 6 + trials
    cached = 0  # a teacher's answers on disk: an index and half a float each
    seconds = 1.3 * tokens * per_token * share / matmul_speed() + sweeps + weights / 4e7
    for step in recipe.steps:
        if step.method.kind in ("training", *TRAINED):
            c = step.config
            # two models, gradients, two moments, the best so far, what waits for the gradient; and logits
            logits = 4 * 4 * c.batch * c.length * model.config.vocab_size // c.accumulate
            memory = max(memory, _PYTHON_AND_TORCH + 4 * 10 * model.parameters_count + logits)
            whole = 4.0 * c.steps * c.batch * c.length * model.parameters_count / matmul_speed()
            cached = max(cached, 6 * c.steps * c.batch * c.length * getattr(c, "cache", 0))
            minutes = getattr(c, "minutes", None)
            seconds += whole if minutes is None else min(whole, 60 * minutes)
    seconds += 3.5 * tokens * weights * sum(epochs) / matmul_speed() if epochs else 0
    for step in recipe.steps:
        c, each = step.config, 1.3 * recipe.calibration.length * weights / matmul_speed()
        if "trials" in step.method.needs:
            trials = c.plans + c.rounds * c.verify
            seconds += shots * trials * (c.trial_samples + c.trial_windows) * each
        if step.method.learn is not None:  # a forward and a backward
            seconds += shots * 3 * c.epochs * allocation_samples(recipe) * each
    if gathered := gradient_tokens(recipe, tokens):  # a forward to disk, and each block again with its gradients
        seconds += 4 * 1.3 * shots * gathered * weights / matmul_speed()
    # dense float32 checkpoints of the steps that rewrite weights
    folded = (
        4
        * model.parameters_count
        * (sum(s.method.kind in ("fold", "rotation") for s in recipe.steps) + min(2, shots - 1))
    )
    return {
        "memory_bytes": float(memory),
        "disk_bytes": float(
            size + folded + 4 * tokens * hidden * (2 if epochs or drift else 1) + cached + sum(outputs)
        ),
        "size_bytes": float(size),
        "seconds": float(seconds),
    }


def allocation_samples(recipe: Recipe) -> int:
    """Calibration samples of the dense pass that an allocation asks for."""
    c = recipe.calibration
    chosen = max(8, c.samples // 4) if c.allocation_samples is None else c.allocation_samples
    return min(c.samples, max(1, chosen))


def _inputs(layers: list[Linear]) -> list[Linear]:
    """One layer for each distinct input."""
    return list({(la.block, la.stage): la for la in layers}.values())


def _numel(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _bits_per_weight(recipe: Recipe) -> float:
    sparsity, bits, group = 0.0, 16, 0
    for step in recipe.steps:
        if step.method.kind == "solver":
            sparsity = step.constraint.target or sparsity
            if step.constraint.bits != 16:
                bits, group = step.constraint.bits, step.constraint.group_size
    scale = (16 + bits) / group if bits != 16 and group else 0.0
    if recipe.save.format == "dense":
        return 16.0
    if recipe.save.format == "compressed-tensors" or not sparsity:
        return bits + scale
    return 1 + bits * (1 - sparsity) + scale
