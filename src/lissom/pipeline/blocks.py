"""Every block in turn: solved, encoded, and written with what a killed run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..core import Budget, Stats
from ..models import Block, Linear, Model
from .artefact import Artefact, LayerRecord
from .behind import Behind
from .blockwise import block_steps, dense_targets, work_on_block
from .data import CalibrationSet, embed
from .drift import DenseRuns, made_up
from .gradients import Tick
from .operating import calibrator
from .planning import Plan
from .recipe import Step
from .stream import Extras, LayerResult, histogram_bins, solve_stage, stream_block
from .trials import Budgets
from .waiting import Aside, Spill, aside
from .workdir import Note, dump_json, hidden_files, keep_hidden

Record = Callable[[], LayerRecord]


def solve_and_save(
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
    """Solve and save every block that is not finished yet; the records of all linear layers.

    On a device, block i is written while i + 1 is solved.
    """
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
    with Behind(model.device) as behind:
        for i in range(done, model.blocks):
            block = model.load_block(i)
            solved, hidden, dense = _solve_block(
                block, artefact, steps, extras(i), healing, hidden, dense, budgets, waiting, note,
                calibrator(made.recipe), data, made.recipe.calibration.drift,
            )  # fmt: skip
            write, states = artefact.part(i, block), (list(hidden), list(dense))

            def save(i=i, solved=solved, write=write, states=states) -> None:
                write()
                here = [record() for record in solved]
                dump_json(work / f"records-{i:05d}.json", [asdict(r) for r in here])
                keep_hidden(work, i + 1, *states)
                records.extend(here)

            behind.do(save)
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
) -> tuple[list[Record], list[Tensor], list[Tensor]]:
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
    records: dict[str, Record] = {}

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
        for result in results:
            damping = result.solved.notes.get("damping")
            if note and damping and damping > asked * 1.001:
                note(f"{result.layer.name}: damping raised to {damping:g} until the Gram matrix was positive definite")

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
