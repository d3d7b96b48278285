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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..core import Budget, OutputError, Stats, device_named
from ..export import open_model
from ..export.layout import dtype_name
from ..models import Block, Linear, Model
from . import gradients
from . import recipe as recipes
from .allocate import budgets_for, needs_held_out
from .artefact import Artefact, LayerRecord, artefact_dtype, bytes_after, bytes_before
from .blockwise import block_steps, dense_targets, work_on_block
from .data import CalibrationSet, embed, load_calibration
from .drift import DenseRuns, made_up
from .folding import folded_model
from .healing import heal, training_steps
from .integer import compress_integer, integer_step, plan_integer
from .lock import alone
from .operating import calibrator, operated, samples_for, with_scales
from .planning import Plan
from .recipe import Step
from .shapes import structured_plan
from .shots import earlier_shots
from .sizing import check_target, chosen_save, expectation, size_budgets, with_choice
from .stream import Extras, LayerResult, histogram_bins, solve_stage, stream_block
from .structured import smaller_model
from .structured_targets import with_targets
from .summary import peak_memory, versions
from .trials import Budgets
from .verify import verify
from .waiting import Aside, Spill, aside
from .workdir import check_writable, dump_json, first_sample, hidden_files, keep_hidden, start

Tick = Callable[[str, int, int], None]
Note = Callable[[str], None]


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
    records = _blocks(work, model, made, budgets, data, artefact, extras, spill, tick, note)
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


def _blocks(
    work: Path,
    model: Model,
    made: Plan,
    budgets: Budgets,
    data: CalibrationSet,
    artefact: Artefact,
    extras: Extras,
    spill: bool,
    tick: Tick | None,
    note: Note | None,
) -> list[LayerRecord]:
    """Solve and save every block that is not finished yet."""
    steps = [(s, budgets.get(i)) for i, s in enumerate(made.recipe.steps) if s.method.kind == "solver"]
    healing = block_steps(made.recipe)
    waiting = Spill(work) if spill else None
    saved = hidden_files(work)
    done = max((n for n in saved if all(artefact.has(i) for i in range(n))), default=None)
    if done is None:
        outer = artefact.outer()
        hidden = embed(model, data.ids, outer)
        dense = embed(model, data.ids) if healing or made.recipe.calibration.drift else []
        del outer
        model.release()
        done = 0
    else:
        states = sorted(load_file(saved[done]).items())
        hidden = [h for name, h in states if not name.startswith("dense-")]
        dense = [h for name, h in states if name.startswith("dense-")]
    records = [LayerRecord(**r) for i in range(done) for r in json.loads((work / f"records-{i:05d}.json").read_text())]
    for i in range(done, model.blocks):
        block = model.load_block(i)
        here, hidden, dense = _solve_block(
            block, artefact, steps, extras(i), healing, hidden, dense, budgets, waiting, note,
            calibrator(made.recipe), data, made.recipe.calibration.drift,
        )  # fmt: skip
        artefact.block(i, block)
        dump_json(work / f"records-{i:05d}.json", [asdict(r) for r in here])
        keep_hidden(work, i + 1, hidden, dense)
        records += here
        if tick:
            tick("compress", i + 1, model.blocks)
    if waiting:
        waiting.close()
    return records


def _solve_block(
    block: Block,
    artefact: Artefact,
    steps: Sequence[tuple[Step, Budget | None]],
    extras: Mapping[str, Mapping[str, Tensor]],
    healing: Sequence[Step],
    hidden: list[Tensor],
    dense: list[Tensor],
    budgets: Budgets,
    waiting: Aside | None,
    note: Note | None,
    calibrate: Callable[[Tensor, Tensor], float] | None = None,
    data: CalibrationSet | None = None,
    drift: float = 0.0,
) -> tuple[list[LayerRecord], list[Tensor], list[Tensor]]:
    """Solve and encode one block; returns its layers' records and what it gives to the next block, in both streams.

    ``dense``: hidden states of the dense model, only there when steps work on whole blocks (``healing``) or ``drift`` is made up for.
    """
    gram = drift > 0 or any("gram" in s.method.needs for s, _ in steps)
    asked = max((getattr(s.config, "damping", 0.0) for s, _ in steps), default=0.0)
    waiting = waiting or aside(block, [*hidden, *dense])
    beside = DenseRuns(block, dense, waiting, len(hidden)) if drift else None
    targets = dense_targets(block, dense) if healing and not beside else []
    inputs = list(hidden) if healing else []
    artefact.settle(block)
    solved: list[LayerResult] = []
    records: dict[str, LayerRecord] = {}

    def keep(layers: Sequence[Linear], results: Sequence[LayerResult]) -> None:
        """Encode the layers; the block goes on with the weights as the file will give them."""
        by_name = {r.layer.name: r for r in results}
        for layer in layers:
            record, stored = artefact.layer(block, layer, by_name.get(layer.name), _cluster(budgets, layer))
            block.set_weight(layer.name, stored)
            records[layer.name] = record

    def solve(stage: tuple[Linear, ...], stats: Stats) -> None:
        weights = made_up({layer.name: block.weight(layer.name) for layer in stage}, stats, drift)
        results = solve_stage(stage, weights, stats, steps, extras)
        solved.extend(results)
        keep(stage, results)
        for layer in stage:
            damping = records[layer.name].damping
            if damping and damping > asked * 1.001:
                _say(note, f"{layer.name}: damping raised to {damping:g} until the Gram matrix was positive definite")

    watch, at_once = (data.watch, data.at_once) if data else (None, False)
    bins = histogram_bins([s for s, _ in steps])
    hidden = stream_block(block, hidden, solve, gram, waiting, watch, calibrate, bins, at_once, extras, beside)
    if beside:
        targets = beside.outputs()
    if healing:
        healed = work_on_block(block, solved, inputs, dense, targets, healing)
        keep([r.layer for r in healed], healed)
        hidden = [block.forward(h) for h in inputs]
    return list(records.values()), hidden, targets


def _cluster(budgets: Budgets, layer: Linear) -> int | None:
    for budget in budgets.values():
        if layer.name in budget.cluster:
            return budget.cluster[layer.name]
    return None
