"""Steps of kind ``operator``: what the run does beside the weights, from recipe to artefact."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core import Rotation
from ..export.writer import write_json
from ..methods.quantize.activations import Activations, static_scale
from ..methods.quantize.kv_cache import KVCache, calibrate_static
from ..models import InputGrid, Linear, Model, Operators
from ..models.layout import Sizes
from ..models.operators import BlockOperators, Constants, read_operators
from .data import embed
from .layers import named, wanted
from .recipe import Recipe, Step

_ERROR_SAMPLES = 4  # for the reported errors of methods that need no data themselves
_STATIC_SAMPLES = 16


def operator_steps(recipe: Recipe) -> list[Step]:
    return [s for s in recipe.steps if s.method.kind == "operator"]


def operators_of(model: Model, recipe: Recipe) -> Operators:
    """What the recipe asks for; raises nothing, see :func:`operator_problems`."""
    out = Operators()
    for step in operator_steps(recipe):
        if isinstance(step.config, Activations):
            c = step.config
            stages = tuple(s for s, (layers, _) in enumerate(_stages(model, c.only)) if layers)
            out = replace(out, activations=InputGrid(c.bits, stages, static=c.per == "tensor"))
        elif isinstance(step.config, KVCache):
            turn = Rotation(Sizes.of(model.architecture, model.config).head_dim, 3) if step.config.rotate else None
            out = replace(out, cache=step.config.grids(), turn_heads=turn)
    return out


def _stages(model: Model, only: Iterable[str]) -> list[tuple[list[Linear], list[Linear]]]:
    """(wanted, other) layers of every stage of block 0."""
    linears = model.linears(0)
    out = []
    for stage in range(1 + max(la.stage for la in linears)):
        here = [la for la in linears if la.stage == stage]
        chosen = [la for la in here if not tuple(only) or any(named(e, la) for e in only)]
        out.append((chosen, [la for la in here if la not in chosen]))
    return out


def operator_problems(model: Model, recipe: Recipe) -> list[str]:
    """What of the operator steps does not fit the model or the format."""
    problems = []
    steps = operator_steps(recipe)
    for name in {s.name for s in steps}:
        if sum(s.name == name for s in steps) > 1:
            problems.append(f"{name}: two steps say what the run does; keep one")
    for step in steps:
        if isinstance(step.config, Activations):
            chosen = _stages(model, step.config.only)
            for layers, others in chosen:
                if layers and others:
                    problems.append(
                        f"{step.name}: {others[0].role} reads the same input as {layers[0].role}; name both or neither in `only`"
                    )
            if not any(layers for layers, _ in chosen):
                roles = ", ".join(dict.fromkeys(la.role for la in model.linears(0)))
                problems.append(f"{step.name}: `only` names no layer of this model (roles: {roles})")
        elif isinstance(step.config, KVCache):
            problems += _cache_problems(model, step)
    solvers = [s for s in recipe.steps if s.method.kind == "solver" and s.constraint.bits != 16]

    def has_bits(layer: Linear) -> bool:
        return any(wanted(layer, s.constraint) for s in solvers)

    return problems + format_problems(model, recipe.save.format, operators_of(model, recipe), has_bits)


def _cache_problems(model: Model, step: Step) -> list[str]:
    c, size = step.config, Sizes.of(model.architecture, model.config).head_dim
    out = []
    if not model.architecture.causal:
        out.append(f"{step.name}: {model.architecture.name} is an encoder and keeps no cache")
    if "token" in (c.keys, c.values) and size % min(c.group_size, size):
        fits = [g for g in range(8, size + 1) if size % g == 0]
        out.append(
            f"{step.name}: groups of {c.group_size} channels do not divide heads of {size}; "
            f"possible: {', '.join(map(str, fits))}"
        )
    return out


def format_problems(model: Model, format: str, operators: Operators, has_bits: Callable[[Linear], bool]) -> list[str]:
    """What of the operators ``format`` cannot hold: compressed-tensors has words for some, config.json of the others for all."""
    out = []
    if format not in ("compressed-tensors", "int-quantized"):
        return out
    if operators.turns:
        out.append("quarot: compressed-tensors cannot hold the run-time rotation (online); use format packed")
    if operators.activations:
        stages = operators.activations.stages
        bare = [
            la for i in range(model.blocks) for la in model.linears(i)
            if la.stage in stages and not has_bits(la)
        ]  # fmt: skip
        if bare:
            out.append(
                f"activations: compressed-tensors rounds inputs of quantized layers only, and {bare[0].name} "
                f"(and {len(bare) - 1} more layers) has no bits; quantize it, leave it out by `only`, or use format packed"
            )
    if operators.cache:
        keys, values = operators.cache
        size = Sizes.of(model.architecture, model.config).head_dim
        wrong = [
            text
            for text, bad in (
                ("keys per token", keys.per != "token"), ("values per token", values.per != "token"),
                ("zero: integer", keys.zero != "integer"), ("recent: 0", keys.recent > 0),
                ("equal bits of keys and values", keys.bits != values.bits), ("rotate: false", operators.turn_heads),
                ("static: false", keys.static),
                (f"a group_size that divides heads of {size}", size % keys.group),
            ) if bad
        ]  # fmt: skip
        if wrong:
            out.append(
                f"kv-cache: kv_cache_scheme of compressed-tensors cannot hold this cache; it needs {', '.join(wrong)} "
                "(or use format dense or packed)"
            )
    return out


def operator_advice(recipe: Recipe, operators: Operators) -> list[str]:
    """What other engines make of the artefact."""
    out = []
    fmt = recipe.save.format
    if operators and fmt != "compressed-tensors":
        what = [w for w, there in (("activations", operators.activations), ("kv-cache", operators.cache)) if there]
        if what:
            out.append(
                f"{' and '.join(what)}: recorded in config.json and honoured by lissom; other engines load the weights and "
                f"run them without"
            )
    if operators.turns:
        out.append("quarot: the input of down is turned at run time; only lissom can run this artefact")
    if fmt == "compressed-tensors" and operators.activations and operators.activations.bits != 8:
        out.append(f"activations: {operators.activations.bits} bits load in transformers; vLLM has kernels for 8 only")
    if fmt == "compressed-tensors" and operators.cache:
        out.append("kv-cache: transformers honours this kv_cache_scheme; vLLM takes FP8 with one static scale only")
    return out


def calibrator(recipe: Recipe) -> Callable[[Tensor, Tensor], float] | None:
    """The static scale of a stage from a sample of its inputs and the samples' largest magnitudes; None when the recipe wants none."""
    for step in operator_steps(recipe):
        if isinstance(step.config, Activations) and step.config.per == "tensor":
            return functools.partial(static_scale, config=step.config)
    return None


def samples_for(recipe: Recipe) -> int:
    """Calibration samples that a recipe uses none of whose methods needs data: for errors, and for static ranges."""
    static = any(
        getattr(s.config, "static", False) or getattr(s.config, "per", "") == "tensor" for s in operator_steps(recipe)
    )
    return _STATIC_SAMPLES if static else _ERROR_SAMPLES


def operated(model: Model, recipe: Recipe, ids: Tensor, path: Path) -> Model:
    """``model`` with the recipe's operators beside its own; the same checkpoint. Static grids of a cache are found on ``ids``
    and kept in ``path``."""
    out = copy.copy(model)
    wanted_here = operators_of(model, recipe)
    out.operators = model.operators.merged(wanted_here)
    step = next((s for s in operator_steps(recipe) if isinstance(s.config, KVCache) and s.config.static), None)
    if step is not None:
        if not path.exists():
            found = cache_grids(out, step.config.percent, ids[:_STATIC_SAMPLES])
            write_json(path, Operators(cache_grids=found).describe())
        kept = read_operators(json.loads(path.read_text(encoding="utf-8")), str(path))
        out.operators = replace(out.operators, cache_grids=kept.cache_grids)
    return out


@torch.no_grad()
def cache_grids(model: Model, percent: float, ids: Tensor) -> dict[int, tuple[Constants, Constants]]:
    """Static grids of every block's keys and values, from one pass over ``ids`` (samples, tokens) with nothing rounded.

    Keys turn with their positions, and slowly in the channels of low frequency: grids of keys at 0 … tokens − 1 clip those of longer
    texts. So the samples stand at places spread over the whole context; attention sees distances, and is the same.
    """
    grids = model.operators.cache
    assert grids is not None
    bare = replace(model.operators, activations=None, cache_grids={})
    hidden, out = embed(model, ids), {}
    places = _spread_positions(model, *ids.shape).split([len(h) for h in hidden])
    for i in range(model.blocks):
        block, seen = model.load_block(i), []
        block.operators = BlockOperators(bare, i)
        block.operators.observe = lambda k, v, seen=seen: seen.append((k, v))
        hidden = [block.forward(h, at) for h, at in zip(hidden, places, strict=True)]
        both = [
            calibrate_static(torch.cat(parts), grid, percent)
            for parts, grid in zip(zip(*seen, strict=True), grids, strict=True)
        ]
        out[i] = tuple(tuple(tuple(map(tuple, t[:, 0].tolist())) for t in one) for one in both)
    return out


def _spread_positions(model: Model, samples: int, tokens: int) -> Tensor:
    """Positions of every sample, (samples, tokens), from the start of the context to its end."""
    limit = max(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
    starts = torch.linspace(0, limit - tokens, samples).round().long()
    return starts[:, None] + torch.arange(tokens)


def with_scales(model: Model, found: Mapping[str, float]) -> Operators:
    """The model's operators with the static scales that were found, layer name → scale."""
    old = model.operators
    if old.activations is None or not old.activations.static:
        return old
    layers = [la for i in range(model.blocks) for la in model.linears(i)]
    scales = {f"{la.block}.{la.stage}": found[la.name] for la in layers if la.name in found}
    return replace(old, activations=replace(old.activations, scales=scales))
