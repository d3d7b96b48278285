"""Recipes of one step of kind ``integer``: an encoder that runs in integers, from token ids to the pooled output.

Nothing streams here: ranges are found by one float pass over the calibration text, and all integers follow from them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core import FormatError, RecipeError
from ..evaluate import pieces
from ..export import load_encoder, write_integer
from ..methods.quantize.ibert_encoder import calibrate, encode
from ..models import Model, encoder_of, encoder_problem
from .artefact import LayerRecord, bytes_after, bytes_before
from .data import load_calibration
from .planning import Plan, estimate
from .recipe import Recipe, Step
from .summary import peak_memory, versions
from .workdir import dump_json

_BATCH = 16  # samples that go through the float encoder together


def integer_step(recipe: Recipe) -> Step | None:
    """The step, where the recipe is of this kind."""
    return next((s for s in recipe.steps if s.method.kind == "integer"), None)


def plan_integer(model: Model, recipe: Recipe) -> Plan:
    """What will be done. Raises :class:`RecipeError` when the model is no encoder of the kind."""
    step = integer_step(recipe)
    assert step is not None
    problems = [f"{step.name}: {why}"] if (why := encoder_problem(model)) else []
    longest = model.config.max_position_embeddings - 2
    if recipe.calibration.length > longest:
        problems.append(f"calibration: samples of {recipe.calibration.length} tokens are longer than {longest}")
    if problems:
        raise RecipeError(problems)
    layers = [layer for i in range(model.blocks) for layer in model.linears(i)]
    rows = tuple(
        {
            "name": la.name, "block": la.block, "role": la.role, "shape": [la.rows, la.columns], "weights": la.rows * la.columns,
            "steps": [step.name], "sparsity": 0.0, "bits": 8,
        } for la in layers
    )  # fmt: skip
    weights = sum(r["weights"] for r in rows)
    guess = estimate(model, recipe, layers, recipe.calibration.samples * recipe.calibration.length)
    size = float(weights + 2 * (model.parameters_count - weights))
    facts = {
        "architecture": model.architecture.name, "blocks": model.blocks, "linear_layers": len(layers),
        "parameters": model.parameters_count, "prunable_weights": weights, "planned_sparsity": 0.0,
    }  # fmt: skip
    guess |= {
        "memory_bytes": guess["memory_bytes"] + 12.0 * model.parameters_count,
        "size_bytes": size,
        "disk_bytes": size,
    }
    return Plan(recipe, (), rows, facts, guess, ("only lissom runs the format integer: evaluate, load_encoder",))


@torch.no_grad()
def compress_integer(
    model: Model,
    source: str,
    target: Path,
    work: Path,
    recipe: Recipe,
    note: Callable[[str], None] | None,
    command: str,
) -> dict[str, Any]:
    """The whole run; returns the manifest with timings. The files are loaded back and give the same integers."""
    started = time.perf_counter()
    made, step, checkpoint = plan_integer(model, recipe), integer_step(recipe), model.checkpoint
    assert step is not None
    tokenizer = checkpoint.tokenizer()
    data = load_calibration(tokenizer, recipe.calibration, model.config.vocab_size)
    for warning in made.warnings:
        if note:
            note(f"note: {warning}")
    ids = pieces(tokenizer, data.ids)
    keep = torch.ones_like(ids, dtype=torch.bool)
    encoder = encoder_of(model)
    seen = calibrate(encoder, list(zip(ids.split(_BATCH), keep.split(_BATCH), strict=True)))
    integers = step.method.run(encoder, seen, step.config)
    shutil.rmtree(work, ignore_errors=True)  # a run takes seconds: nothing of an interrupted one is worth keeping
    sizes = write_integer(integers, checkpoint, work)
    again = load_encoder(work)
    if not torch.equal(encode(again.encoder, ids[:4], keep[:4]), encode(integers, ids[:4], keep[:4])):
        raise FormatError(f"the encoder loaded back from {work} gives other integers; the artefact is not kept")
    records = [
        LayerRecord(
            r["name"], r["block"], r["role"], r["shape"], r["weights"], "dense", 0.0, 8, None, None, None, None, None, 0,
            sizes[f"layers.{r['block']}.linears.{r['role']}.weight"], 0,
        ) for r in made.layers
    ]  # fmt: skip
    linear, size = sum(r.bytes for r in records), again.bytes
    weights = sum(r.weights for r in records)
    manifest = {
        "lissom": __version__, "source": source, "command": command, "recipe": recipe.describe(), "model": made.model,
        "warnings": list(made.warnings),
        "calibration": {"hash": data.hash, "held_out": 0, **asdict(recipe.calibration)},
        "allocation": {}, "structured": {}, "targets": {}, "folded": {}, "operators": {}, "healing": {},
        "layers": [asdict(r) for r in records], "dense_bytes": checkpoint.bytes, "versions": versions(), "bytes": size,
        "bits_per_weight": 8 * size / model.parameters_count, "linear_bits_per_weight": 8 * linear / weights, "sparsity": 0.0,
        "bytes_before": bytes_before(model, checkpoint.bytes), "bytes_after": bytes_after(records, size),
        "verified": {"integers": f"{len(sizes)} tensors loaded back, none of them floats, give the same pooled integers"},
    }  # fmt: skip
    timings = {
        "seconds": time.perf_counter() - started,
        "stages": {},
        "peak_rss_bytes": peak_memory(),
        "calibration_tokens": ids.numel(),
    }
    dump_json(work / "manifest.json", manifest)
    dump_json(work / "timings.json", timings)
    os.replace(work, target)
    return manifest | timings | {"out": str(target)}
