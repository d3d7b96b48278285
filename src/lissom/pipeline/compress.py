"""The whole run: open, plan, embed, allocate, solve block by block, close, load back and compare.

Everything durable lives in ``OUT.partial`` until the end: ``run.json`` (what the run is), ``budgets.json``, one weight
file per finished block, and the hidden states after the newest finished block. A killed run goes on from there
and ends with the same bytes; ``OUT`` appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .. import __version__
from ..core import Budget, OutputError, device_named
from ..export import open_model
from ..export.layout import dtype_name
from ..models import Model
from . import gradients
from . import recipe as recipes
from .allocate import budgets_for, needs_held_out
from .artefact import Artefact, artefact_dtype, bytes_after, bytes_before
from .blocks import solve_and_save
from .data import CalibrationSet, load_calibration
from .folding import folded_model
from .gradients import Tick
from .healing import heal, training_steps
from .integer import compress_integer, integer_step, plan_integer
from .lock import alone
from .operating import operated, samples_for, with_scales
from .planning import Plan
from .shapes import structured_plan
from .shots import earlier_shots
from .sizing import check_target, chosen_save, expectation, size_budgets, with_choice
from .stream import Extras
from .structured import smaller_model
from .structured_targets import with_targets
from .summary import peak_memory, versions
from .trials import Budgets
from .verify import verify
from .workdir import Note, check_writable, dump_json, first_sample, hidden_files, start


def plan(
    source: str | Path,
    recipe: Any = "aggressive",
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    tick: Tick | None = None,
) -> Plan:
    """Resolve a recipe against a model without writing weights. Raises ``RecipeError`` with all mistakes.

    A recipe with a target is measured here as in a run, which takes minutes; any other takes no look at the weights.
    """
    checked = recipes.read(recipe, overrides)
    model = Model(open_model(source))
    if integer_step(checked):
        return plan_integer(model, checked)
    checked, _ = with_targets(model, checked)
    made = structured_plan(model, checked, Path(out) if out else None)
    if checked.target is None:
        return made
    check_target(model, made)
    data = load_calibration(
        model.checkpoint.tokenizer(), checked.calibration, model.config.vocab_size, needs_held_out(made)
    )
    with tempfile.TemporaryDirectory() as folder:
        _, record = size_budgets(model, made, data, Path(folder), tick)
    return with_choice(made, record)


@torch.no_grad()
def compress(
    source: str | Path,
    out: str | Path,
    recipe: Any = "aggressive",
    *,
    overrides: Sequence[str] = (),
    resume: bool = True,
    spill: bool = False,
    device: str = "auto",
    tick: Tick | None = None,
    note: Note | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Compress the checkpoint ``source`` into the directory ``out``.

    ``recipe``: shipped name, YAML file, mapping, or list of steps; ``overrides``: "key=value" strings as of ``--set``.
    ``resume=False`` throws away what an interrupted run left. ``spill`` keeps waiting activations on disk. ``device`` is where
    blocks are run and solved, one at a time (``auto``: CUDA where there is one); hidden states wait in the host's memory.
    ``tick(label, done, total)`` and ``note(text)`` report progress. Returns the manifest with timings.
    Raises :class:`lissom.core.LissomError` subclasses before work starts when anything does not fit.
    """
    target, place = Path(out), device_named(device)
    if target.exists():
        raise OutputError(f"{target} exists; choose another directory or remove it")
    check_writable(target)
    checked = recipes.read(recipe, overrides)
    work = target.with_name(target.name + ".partial")
    with alone(work):
        if integer_step(checked):
            return compress_integer(Model(open_model(source)), str(source), target, work, checked, note, command)
        return _compress(source, target, work, checked, resume, spill, place, tick, note, command)


def _compress(
    source: str | Path,
    target: Path,
    work: Path,
    checked: recipes.Recipe,
    resume: bool,
    spill: bool,
    device: torch.device,
    tick: Tick | None,
    note: Note | None,
    command: str,
) -> dict[str, Any]:
    started = time.perf_counter()
    checkpoint = open_model(source)
    dense = model = Model(checkpoint, device=device)
    asked = checked
    checked, targets = with_targets(model, asked, work / "targets.json" if resume else None)
    made = structured_plan(model, checked, target)
    check_target(model, made)
    data = load_calibration(checkpoint.tokenizer(), checked.calibration, model.config.vocab_size, needs_held_out(made))
    needs = bool(gradients.wanted_extras(checked)) or any(
        (step.method.needs and step.method.kind != "training") or step.constraint.shots > 1 for step in checked.steps
    )  # training reads its own text
    if not needs and checked.target is None:
        data = replace(data, ids=data.ids[: samples_for(checked)])
    for warning in made.warnings:
        _say(note, f"note: {warning}")
    identity = {
        "lissom": __version__,
        "source": checkpoint.fingerprint(),
        "recipe": {k: v for k, v in asked.describe().items() if k in ("steps", "save", "target")},
        "calibration": {"hash": data.hash, "held_out": len(data.held_out), **asdict(checked.calibration)},
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if not (work / "run.json").exists():
        model.check_weights()  # minutes before hours of work
    start(work, identity, resume, note)
    if targets:
        dump_json(work / "targets.json", targets)
    stages = {"open": time.perf_counter() - started}

    clock = time.perf_counter()
    model, removed = smaller_model(
        dense, checked, data, work / "smaller", artefact_dtype(dense, checked.save.dtype), tick
    )
    model, folded = folded_model(model, checked, data.ids, work / "folded", tick)
    stages["structured"] = time.perf_counter() - clock
    model = operated(model, checked, data.ids, work / "cache.json")

    clock = time.perf_counter()
    dtype = artefact_dtype(model, checked.save.dtype)
    model, floors = earlier_shots(model, made, data, work / "shots", tick)
    stages["shots"] = time.perf_counter() - clock

    clock = time.perf_counter()
    extras = gradients.for_recipe(model, data.ids, work, checked, tick)
    stages["gradients"] = time.perf_counter() - clock

    clock = time.perf_counter()
    budgets, allocation = _budgets(work, model, made, data, extras, floors, tick)
    stages["allocate"] = time.perf_counter() - clock
    if checked.target:
        _say(note, expectation(next(iter(allocation.values()))))

    clock = time.perf_counter()
    artefact = Artefact(work, model, replace(chosen_save(checked, allocation), dtype=dtype_name(dtype)))
    records = solve_and_save(work, model, made, budgets, data, artefact, extras, spill, tick, note)
    sample = first_sample(load_file(hidden_files(work)[model.blocks]))
    stages["blocks"] = time.perf_counter() - clock

    model.operators = with_scales(model, {r.name: r.input_scale for r in records if r.input_scale is not None})
    healing: dict[str, Any] = {}
    for step in training_steps(checked):
        clock = time.perf_counter()
        healed = heal(
            work / "training", model, dense, artefact, records, step, checked.calibration.data, data.ids[:1], tick
        )
        records, sample, healing[step.name] = healed.records, healed.hidden, healed.history
        stages[step.name] = time.perf_counter() - clock

    clock = time.perf_counter()
    manifest = {
        "lissom": __version__,
        "source": str(source),
        "command": command,
        "recipe": checked.describe(),
        "model": made.model,
        "warnings": list(made.warnings),
        "calibration": identity["calibration"],
        "allocation": allocation,
        "structured": removed,
        "targets": targets,
        "folded": folded,
        "operators": model.operators.describe(),
        "healing": healing,
        "layers": [asdict(r) for r in records],
        "dense_bytes": checkpoint.bytes,
        "versions": versions(),
        "device": device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
    }
    after = artefact.close()
    size = sum(after.values())
    linear = sum(r.weights for r in records)
    manifest |= {
        "bytes": size,
        "bits_per_weight": 8 * size / model.parameters_count,
        "linear_bits_per_weight": 8 * sum(r.bytes for r in records) / max(linear, 1),
        "sparsity": sum(r.sparsity * r.weights for r in records) / max(linear, 1),
        "bytes_before": bytes_before(dense, checkpoint.bytes),
        "bytes_after": bytes_after(records, size),
    }
    stages["save"] = time.perf_counter() - clock

    clock = time.perf_counter()
    manifest |= {"verified": verify(work, manifest, data.ids[:1], sample, note)}
    stages["verify"] = time.perf_counter() - clock
    timings = {
        "seconds": time.perf_counter() - started,
        "stages": stages,
        "peak_rss_bytes": peak_memory(),
        **({"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}),
        "calibration_tokens": data.ids.numel(),
    }
    dump_json(work / "manifest.json", manifest)
    dump_json(work / "timings.json", timings)
    for leftover in (
        *hidden_files(work).values(),
        work / "run.json",
        work / "budgets.json",
        work / "targets.json",
        work / "cache.json",
        *work.glob("records-*.json"),
        *work.glob("gradients-*.safetensors"),
        *work.glob("trials-*.json"),
    ):
        leftover.unlink(missing_ok=True)
    for folder in ("training", "smaller", "curves", "folded", "shots"):
        shutil.rmtree(work / folder, ignore_errors=True)
    os.replace(work, target)
    return manifest | timings | {"out": str(target)}


def _say(note: Note | None, text: str) -> None:
    if note:
        note(text)


def _budgets(
    work: Path,
    model: Model,
    made: Plan,
    data: CalibrationSet,
    extras: Extras,
    floors: Budgets,
    tick: Tick | None,
) -> tuple[Budgets, dict[str, Any]]:
    path = work / "budgets.json"
    if not path.exists():
        if made.recipe.target:
            budgets, record = size_budgets(model, made, data, work / "curves", tick)
        else:
            budgets, record = budgets_for(model, made, data, tick, extras=extras, floors=floors, folder=work)
        dump_json(path, {"budgets": {str(i): asdict(b) for i, b in budgets.items()}, "record": record})
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {int(i): Budget(**b) for i, b in saved["budgets"].items()}, saved["record"]
