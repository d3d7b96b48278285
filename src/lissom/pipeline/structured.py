"""Structured steps: before anything else, the checkpoint becomes a smaller ordinary one; the rest of the run starts there.

Every block is saved with the same number of heads and neurons, because configs of transformers hold one number for all
blocks: the plan says which. Blocks stream by; a block sees what the smaller blocks before it give. Steps that train
(:mod:`.gated`) have the whole model in memory instead.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import HOST, Stats, UnitProblem, Units, moved, on
from ..export import ArtefactWriter, open_model
from ..export.writer import write_json
from ..methods.structured import influence, widths
from ..models import Block, Linear, Model
from ..models.channels import narrower_block, narrower_outer
from ..models.units import KINDS, masked, smaller_block, smaller_config, units_of
from . import gradients
from .data import CalibrationSet, embed
from .gated import train_units
from .permutation import pattern_of, permute_blocks
from .recipe import REWRITES, TRAINED, Recipe, Step
from .shapes import Shape, full_shape, mean_shape, shape_after
from .stream import stream_block
from .structured_search import searched

Tick = Callable[[str, int, int], None]


def smaller_model(
    model: Model, recipe: Recipe, data: CalibrationSet, folder: Path, dtype: torch.dtype, tick: Tick | None = None
) -> tuple[Model, list[dict[str, Any]]]:
    """What the structured steps make of ``model``, in ``folder``, and what they kept; itself when there are none.

    A step that is complete on disk is not done again; one that was killed starts again.
    """
    record, ids = [], data.ids
    for number, step in enumerate(s for s in recipe.steps if s.method.kind in REWRITES):
        place = folder / str(number)
        done = place / "kept.json"
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            if step.method.kind in TRAINED:
                made = cut_out(
                    model, step, ids, place, folder / f"{number}-training", recipe.calibration.data, dtype, tick
                )
            else:
                with on(model.device):
                    if step.method.kind == "permutation":
                        made = permuted(model, step, pattern_of(model, step, recipe), data, place, dtype, tick)
                    else:
                        made = rewrite(model, step, ids, place, dtype, tick)
            write_json(done, made)
        record.append(json.loads(done.read_text(encoding="utf-8")))
        model = Model(open_model(place), device=model.device)
    return model, record


@dataclass(frozen=True)
class _View:
    """What :meth:`ArtefactWriter.finish` reads of a checkpoint, with another config."""

    config: Any
    copy_assets: Callable[[Path], None]


@torch.no_grad()
def rewrite(
    model: Model, step: Step, ids: Tensor, folder: Path, dtype: torch.dtype, tick: Tick | None = None
) -> dict[str, Any]:
    """Write the smaller model into ``folder``; ``ids`` (samples, tokens). Returns what was kept, for the manifest."""
    shape = shape_after(model, step)
    record: dict[str, Any] = {"step": step.name, "heads": {}, "neurons": {}}
    if shape.channels < model.width:
        kept = _choose_channels(model, step, shape.channels, ids, folder, tick)
        record["channels"] = kept.tolist()
        blocks = [(model, i, {}) for i in range(model.blocks)]
        _write(model, blocks, {"channels": kept}, folder / "narrow", torch.float32)
        model = Model(open_model(folder / "narrow"), device=model.device)
    writer = ArtefactWriter(folder)
    hidden = embed(model, ids)
    config = model.config
    if step.method.kind == "blocks":
        keep, influences = _choose_blocks(model, step, hidden)
        record |= {"blocks": keep, "influence": influences}
        for j, i in enumerate(keep):
            writer.add(f"block-{j:05d}", _renamed(model, model.load_block(i), i, j, dtype))
        config = smaller_config(model.architecture, config, None, None, keep)
    else:
        config = smaller_config(model.architecture, config, shape.heads, shape.neurons, range(model.blocks))
        biased = _bias_switches(model, step)
        for switch in biased:
            setattr(config, switch, True)
        _gather(model, step, ids, folder, tick)
        counts, record["search"] = _counts(model, step, shape, hidden, folder, ids, tick)
        for i in range(model.blocks):
            block = model.load_block(i)
            wanted = {kind: per_block[i] for kind, per_block in counts.items()}
            chosen, hidden, biases = _choose_units(block, step, wanted, shape, hidden, folder)
            for kind, (_, kept) in chosen.items():
                record[kind][str(i)] = kept[: wanted[kind]].sort().values.tolist()
            block.parameters = _with_biases(smaller_block(block, chosen), block, biases, biased)
            writer.add(f"block-{i:05d}", {k: v.to(dtype).contiguous() for k, v in block.tensors().items()})
            if tick:
                tick(step.name, i + 1, model.blocks)
        for file in folder.glob("gradients-*.safetensors"):
            file.unlink()
    outer = {n: model.checkpoint.tensor(n) for n in model.outer_names()}
    writer.add("outer", {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in outer.items()})
    writer.finish(_View(config, model.checkpoint.copy_assets), dtype)  # type: ignore[arg-type]
    shutil.rmtree(folder / "narrow", ignore_errors=True)
    return record


@torch.no_grad()
def permuted(
    model: Model,
    step: Step,
    nm: tuple[int, int],
    data: CalibrationSet,
    folder: Path,
    dtype: torch.dtype,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Write the same function with reordered channels into ``folder``. Returns the orders' gains, for the manifest."""
    writer = ArtefactWriter(folder)

    def write(i: int, block: Block) -> None:
        writer.add(f"block-{i:05d}", {k: v.to(dtype).contiguous() for k, v in block.tensors().items()})

    record = {"step": step.name, "heads": {}, "neurons": {}}
    record |= permute_blocks(model, step, nm, embed(model, data.ids), write, tick, data.watch)
    outer = {n: model.checkpoint.tensor(n) for n in model.outer_names()}
    writer.add("outer", {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in outer.items()})
    writer.finish(_View(model.config, model.checkpoint.copy_assets), dtype)  # type: ignore[arg-type]
    return record


@torch.no_grad()
def cut_out(
    model: Model, step: Step, ids: Tensor, folder: Path, training: Path, data: str, dtype: torch.dtype,
    tick: Tick | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train (:func:`.gated.train_units`) with the state in ``training``, and write what is left of the model into ``folder``."""
    shape = shape_after(model, step)
    keep, full = asdict(shape), full_shape(model)
    trained = train_units(model, step, keep, ids, training, data, tick)
    chosen = {k: _best(s, keep[k]) for k, s in trained.scores.items() if k in ("blocks", "channels")}
    kept_blocks = chosen.get("blocks", torch.arange(model.blocks)).tolist()
    record: dict[str, Any] = {"step": step.name, "heads": {}, "neurons": {}, **trained.record}
    record |= {k: v.tolist() for k, v in chosen.items()}
    blocks = []
    for j, i in enumerate(kept_blocks):
        block, units = trained.network.blocks[i], {}
        for kind in KINDS:
            if keep[kind] < full[kind]:
                kept = _best(trained.scores[kind][i], keep[kind])
                units[kind] = (units_of(block.row, block.config, block.linears, kind), kept)
                record[kind][str(j)] = kept.tolist()
        blocks.append((block, i, units))
    _write(model, blocks, chosen, folder, dtype, trained.network.outer)
    return record


def _write(
    model: Model,
    blocks: Sequence[tuple[Any, int, dict[str, tuple[Units, Tensor]]]],
    chosen: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    outer: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model of the given ``blocks`` (the block, or the model to load it from; its number; units that stay, by kind),
    with the ``chosen`` channels; ``outer``: trained tensors in the place of the file's."""
    writer, row, prefix = ArtefactWriter(folder), model.architecture, model.prefix
    channels = chosen.get("channels")
    counts: dict[str, int] = {}
    for j, (held, i, units) in enumerate(blocks):
        block = copy.copy(held.load_block(i) if isinstance(held, Model) else held)
        block.parameters = smaller_block(block, units)
        if channels is not None:
            block.parameters = narrower_block(block, channels)
        counts = {k: len(kept) for k, (_, kept) in units.items()}
        writer.add(f"block-{j:05d}", _renamed(model, block, i, j, dtype))
    tensors = {n: model.checkpoint.tensor(n) for n in model.outer_names()} | dict(outer or {})
    if channels is not None:
        tensors = narrower_outer(row, model.config, prefix, tensors, channels.to(HOST))
    writer.add("outer", {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in tensors.items()})
    config = smaller_config(
        row, model.config, counts.get("heads"), counts.get("neurons"), [i for _, i, _ in blocks],
        None if channels is None else len(channels),
    )  # fmt: skip
    writer.finish(_View(config, model.checkpoint.copy_assets), dtype)  # type: ignore[arg-type]


def _choose_channels(model: Model, step: Step, count: int, ids: Tensor, folder: Path, tick: Tick | None) -> Tensor:
    """The channels with the largest scores, summed over all blocks."""
    _gather(model, step, ids, folder, tick)
    total = torch.zeros(model.width)
    for i in range(model.blocks):
        block = model.load_block(i)
        units = units_of(block.row, block.config, block.linears, "channels")
        total += step.method.run(_problem(block, units, gradients.block_extras(folder, i), {}), step.config)
    for file in folder.glob("gradients-*.safetensors"):
        file.unlink()
    return _best(total, count)


def _choose_blocks(model: Model, step: Step, hidden: list[Tensor]) -> tuple[list[int], list[float]]:
    influences = []
    for i in range(model.blocks):
        block = model.load_block(i)
        after = [block.forward(h) for h in hidden]
        influences.append(influence(torch.cat(hidden), torch.cat(after)))
        hidden = after
    return step.method.run(influences, step.config), influences


def _counts(
    model: Model, step: Step, shape: Shape, hidden: list[Tensor], folder: Path, ids: Tensor, tick: Tick | None
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Units that each block keeps, and what a search found. Where blocks may differ, the scores of the dense blocks are
    compared first."""
    mean, blocks = asdict(mean_shape(model, step)), range(model.blocks)
    if mean == asdict(shape):
        return {kind: [mean[kind] for _ in blocks] for kind in KINDS}, {}
    scores: dict[str, list[Tensor]] = {k: [] for k in KINDS}
    here = list(hidden)
    for i in blocks:
        block = model.load_block(i)
        units = {k: units_of(block.row, block.config, block.linears, k) for k in KINDS}
        extras = gradients.block_extras(folder, i)

        def visit(stage: tuple[Linear, ...], stats: Stats) -> None:
            for kind, group in units.items():  # noqa: B023  (called while this block streams)
                if stage[0].name in group.columns:
                    problem = _problem(block, group, extras, {stage[0].name: stats})  # noqa: B023
                    scores[kind].append(step.method.run(problem, step.config))

        here = stream_block(block, here, visit, "gram" in step.method.needs)
    high, stacked = asdict(shape), {k: torch.stack(s) for k, s in scores.items()}
    if step.config.search:
        return searched(model, stacked, mean, high, ids, step.config.search, tick)
    return {k: widths(s, mean[k], high[k]) for k, s in stacked.items()}, {}


def _gather(model: Model, step: Step, ids: Tensor, folder: Path, tick: Tick | None) -> None:
    """Write what the step reads of the gradients of the dense model, where it reads any."""
    if step.name in gradients.WANTED:
        gradients.gather(model, ids, folder, gradients.WANTED[step.name], tick)


def _problem(
    block: Block, units: Units, extras: Mapping[str, Mapping[str, Tensor]], inputs: Mapping[str, Stats]
) -> UnitProblem:
    weights = {la.name: block.weight(la.name) for la in block.linears}
    samples, grams = ({n: e[key] for n, e in extras.items() if key in e} for key in ("samples", "output_gram"))
    return moved(UnitProblem(units, weights, inputs, samples, grams, block.number), block.device)


def _choose_units(
    block: Block, step: Step, wanted: Mapping[str, int], shape: Shape, hidden: list[Tensor], folder: Path
) -> tuple[dict[str, tuple[Units, Tensor]], list[Tensor], dict[str, Tensor]]:
    """Units in the file, {kind: (units, indices)}: the ``wanted`` ones that stay first, then others, set to zero, up to the
    width of ``shape``; the block's outputs without the others; biases in their place."""
    saved, extras = asdict(shape), gradients.block_extras(folder, block.number)
    units = {k: units_of(block.row, block.config, block.linears, k) for k in KINDS}
    chosen: dict[str, tuple[Units, Tensor]] = {}
    biases: dict[str, Tensor] = {}

    def visit(stage: tuple[Linear, ...], stats: Stats) -> None:
        for kind, group in units.items():
            if stage[0].name not in group.columns or saved[kind] >= group.count:
                continue
            problem = _problem(block, group, extras, {stage[0].name: stats})
            order = step.method.run(problem, step.config).argsort(descending=True, stable=True)
            keep = order[: wanted[kind]].sort().values
            chosen[kind] = (group, torch.cat((keep, order[wanted[kind] : saved[kind]])))
            block.parameters = masked(block.parameters, group, keep)
            for key, value in step.config.repair(problem, keep).items():
                name, _, part = key.rpartition(".")
                if part == "bias":
                    if not _can_hold(block, name):
                        continue
                    old = block.bias(name)
                    biases[name] = value = value if old is None else old + value
                block.parameters[key] = value

    return chosen, stream_block(block, hidden, visit, "gram" in step.method.needs), biases


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, rising; of equals the first ones stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _can_hold(block: Block, name: str) -> bool:
    return block.bias(name) is not None or bool(block.row.branch_biases)


def _bias_switches(model: Model, step: Step) -> tuple[str, ...]:
    """Config switches that must be on for the biases that the step makes."""
    if not getattr(step.config, "bias", False):
        return ()
    return model.architecture.branch_biases


def _with_biases(
    parameters: dict[str, Tensor], block: Block, biases: dict[str, Tensor], switches: Sequence[str]
) -> dict[str, Tensor]:
    """Where the config's switches now ask for biases, every layer gets one; zero unless ``biases`` has it."""
    out = dict(parameters) | {f"{n}.bias": b for n, b in biases.items()}
    if switches:
        for layer in block.linears:
            out.setdefault(f"{layer.name}.bias", torch.zeros(len(out[f"{layer.name}.weight"])))
    return out


def _renamed(model: Model, block: Block, old: int, new: int, dtype: torch.dtype) -> dict[str, Tensor]:
    at, to = (model.prefix + model.architecture.layer.format(i) for i in (old, new))
    return {to + n.removeprefix(at): t.to(dtype).contiguous() for n, t in block.tensors().items()}
