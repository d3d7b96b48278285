"""Steps that rewrite the weights without changing the function, before anything else: SmoothQuant, AWQ, QuaRot.

Each makes a dense checkpoint in float32 (``folded/`` of the working directory) on which the rest of the run starts; a
step that is complete there is not done again. Factors need one dense pass over the calibration text.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import HOST, NumericalError, Problem, Stack, Stats, on
from ..export import ArtefactWriter, open_model
from ..export.writer import write_json
from ..methods.quantize.rotations import Turns, fold_gain, rotate_reader, rotate_values, rotate_writer
from ..methods.quantize.spinquant import Seen, SpinQuant
from ..models import Block, Linear, Model, Operators
from ..models.folds import Source, fold, owners, rotation_refusal, shared_factor, source_of, value_rows
from ..models.layout import Sizes, has_final_norm
from .data import embed
from .layers import constraint_for, wanted
from .recipe import Recipe, Step
from .stream import stream_block

Tick = Callable[[str, int, int], None]


def folding_steps(recipe: Recipe) -> list[Step]:
    """Steps that rewrite weights without changing the function."""
    return [s for s in recipe.steps if s.method.kind in ("rotation", "fold")]


@dataclass(frozen=True)
class Written:
    """What :meth:`ArtefactWriter.finish` reads of a checkpoint, with another config."""

    config: Any
    copy_assets: Callable[[Path], None]


def fold_problems(model: Model, recipe: Recipe, warnings: list[str]) -> list[str]:
    """Steps whose factors or rotations cannot be fused into this model."""
    out: list[str] = []
    turned = set(model.operators.turn_inputs)
    for step in folding_steps(recipe):
        if step.method.kind == "rotation":
            turned |= {3} if step.config.online else set()
            why = rotation_refusal(model.architecture, model.config)
            if why and step.config.stream:
                out.append(f"{step.name}: the hidden states cannot be turned in {why}; set stream=false")
            if not (step.config.stream or step.config.values or step.config.online):
                out.append(f"{step.name}: nothing is turned; set stream, values or online")
            if step.config.stream and model.tied:
                warnings.append(f"{step.name}: the head is no longer the embedding: the artefact holds both")
            if step.config.online and recipe.save.format == "compressed-tensors":
                out.append(
                    f"{step.name}: compressed-tensors cannot hold the run-time rotation (online); use format packed"
                )
            continue
        if step.name == "awq" and _next_grid(recipe, step) is None:
            out.append("awq: without bits it folds for the step after it, and no later step has bits")
        sources = [_source(model, 0, stage, turned) for stage in range(4)]
        chosen = [(s, src) for s, src in enumerate(sources) if any(wanted(la, step.constraint) for la in _at(model, s))]
        refused = [src for _, src in chosen if isinstance(src, str) and "whose step folds for both" not in src]
        if step.constraint.only and refused:
            out.append(f"{step.name}: a factor cannot be folded for {'; '.join(refused)}; take it out of `only`")
        elif len(refused) == len(chosen):
            out.append(f"{step.name}: no factor can be folded into this model: {'; '.join(refused)}")
        else:
            warnings += [f"{step.name}: not folded for {why}" for why in refused]
    return out


def folded_model(
    model: Model, recipe: Recipe, ids: Tensor, folder: Path, tick: Tick | None = None
) -> tuple[Model, list[dict[str, Any]]]:
    """What the folding steps make of ``model``, and notes for the manifest; itself when there are none."""
    record: list[dict[str, Any]] = []
    for number, step in enumerate(folding_steps(recipe)):
        place = folder / str(number)
        done = place / "folded.json"
        turns = _turns(model, step) if step.method.kind == "rotation" else None
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            told: dict[str, Any] = {}
            with on(model.device):
                if turns is None:
                    notes = fold_model(model, recipe, step, ids, place, tick)
                else:
                    if step.method.fold is not None:
                        turns, told = step.method.fold(turns, *_seen(model, step.config, ids, tick), step.config)
                    notes = rotate_model(model, turns, place, tick) | told
            write_json(done, {"step": step.name, **notes})
        record.append(json.loads(done.read_text(encoding="utf-8")))
        online = {3: turns.inner} if turns is not None and turns.inner is not None else {}
        before = model.operators
        model = Model(open_model(place), device=model.device)
        model.operators = before.merged(Operators(turn_inputs=online))
    return model, record


def _at(model: Model, stage: int) -> list[Linear]:
    return [la for la in model.linears(0) if la.stage == stage]


def _source(model: Model, i: int, stage: int, turned: Collection[int]) -> Source | str:
    """Where a factor for the stage's input can go; ``turned``: stages whose inputs are rotated at run time."""
    row = model.architecture
    if stage in turned:
        return f"{_at(model, stage)[0].role}: its input is rotated at run time, which does not commute with a factor"
    return source_of(row, model.config, model.prefix + row.layer.format(i), model.linears(i), stage)


def _next_grid(recipe: Recipe, step: Step) -> Step | None:
    """The first later step that rounds."""
    later = recipe.steps[recipe.steps.index(step) + 1 :]
    return next((s for s in later if s.method.kind == "solver" and s.constraint.bits != 16), None)


@torch.no_grad()
def fold_model(
    model: Model, recipe: Recipe, step: Step, ids: Tensor, folder: Path, tick: Tick | None = None
) -> dict[str, Any]:
    """Write ``model`` with a factor folded wherever it is exact and the step's ``only`` and ``ignore`` allow."""
    writer, hidden = ArtefactWriter(folder), embed(model, ids)
    rounding = _next_grid(recipe, step)
    assert step.method.fold is not None
    notes: dict[str, dict[str, float]] = {}
    for i in range(model.blocks):
        block = model.load_block(i)
        found: list[tuple[Source, Tensor]] = []
        samples = _sampled(block, hidden[0]) if "sample" in step.method.needs else {}

        def visit(
            stage: tuple[Linear, ...],
            stats: Stats,
            i: int = i,
            block: Block = block,
            found: list = found,
            samples: dict = samples,
        ) -> None:
            source = _source(model, i, stage[0].stage, model.operators.turn_inputs)
            if isinstance(source, str) or not any(wanted(la, step.constraint) for la in stage):
                return
            weight = torch.cat([block.weight(la.name) for la in source.readers])
            parts = tuple(
                (la.rows, constraint_for(la, rounding.constraint if rounding else step.constraint, None))
                for la in source.readers
            )
            extras = {"sample": samples.get(stage[0].stage), "owner": owners(source, block.sizes)}
            problem = Problem(
                weight, stats, Stack(parts), tuple(la.name for la in source.readers),
                extras={k: v for k, v in extras.items() if v is not None},
            )  # fmt: skip
            s, told = step.method.fold(problem, step.config)  # type: ignore[misc]
            if not bool((torch.isfinite(s) & (s > 0)).all()):
                raise NumericalError(
                    f"{step.name}: the factors of {stage[0].name} are not positive and finite; leave it out with `ignore`"
                )
            found.append((source, shared_factor(source, s, block.sizes)))
            notes[stage[0].name] = told

        hidden = stream_block(block, hidden, visit, "gram" in step.method.needs)
        for source, s in found:
            fold(block, source, s)
        writer.add(f"block-{i:05d}", block.tensors())
        if tick:
            tick(step.name, i + 1, model.blocks)
    finish_dense(model, model.config, writer, {n: model.checkpoint.tensor(n) for n in model.outer_names()})
    return {"layers": notes}


_TOKENS = 512  # of a stage's inputs that a fold may look at


def _sampled(block: Block, hidden: Tensor) -> dict[int, Tensor]:
    """Evenly spaced tokens of the inputs of every stage, (tokens, in)."""
    run, out = block.start(hidden), {}
    for stage in block.stages:
        x = run.input().flatten(0, 1)
        out[stage[0].stage] = x[:: -(-len(x) // _TOKENS)].clone()
        run.advance()
    return out


def _turns(model: Model, step: Step) -> Turns:
    s = Sizes.of(model.architecture, model.config)
    return step.method.run(step.config, s.width, s.head_dim, s.inner)


_SAMPLES = 8  # of the calibration, for learned rotations


@torch.no_grad()
def _seen(model: Model, c: SpinQuant, ids: Tensor, tick: Tick | None = None) -> tuple[list[Seen], list[Seen]]:
    """Layers that read the stream, and output projections, of evenly spaced blocks, with tokens of their inputs."""
    chosen = {round(i) for i in torch.linspace(0, model.blocks - 1, c.blocks).tolist()}
    generator, row = torch.Generator().manual_seed(c.seed), model.architecture
    hidden = torch.cat(embed(model, ids[:_SAMPLES]))
    tokens = torch.randperm(hidden.shape[0] * hidden.shape[1], generator=generator, device=HOST)[: c.tokens]
    found: tuple[list[Seen], list[Seen]] = ([], [])
    for i in range(model.blocks):
        block = model.load_block(i)
        if i not in chosen:
            hidden = block.forward(hidden)
            continue
        run = block.start(hidden)
        for stage in block.stages:
            x, number = run.input().flatten(0, 1)[tokens], stage[0].stage
            W = torch.cat([block.weight(la.name) for la in stage])
            W = W[torch.randperm(len(W), generator=generator, device=HOST)[: c.rows]]
            if number in (0, 2) and c.stream:
                norm = (
                    f"{model.prefix}{row.layer.format(i)}{row.norm_attention if number == 0 else row.norm_mlp}.weight"
                )
                gain = _gain(row.norm, block.parameters[norm])
                found[0].append(Seen(torch.where(gain == 0, 0.0, x / gain), W * gain))
            elif number == 1 and c.values:
                found[1].append(Seen(x, W))
            run.advance()
        hidden = run.output()
        if tick:
            tick("spinquant", i + 1, model.blocks)
    return found


@torch.no_grad()
def rotate_model(model: Model, turns: Turns, folder: Path, tick: Tick | None = None) -> dict[str, Any]:
    """Write ``model`` under fused rotations; the input of down must then be turned by ``turns.inner`` at run time."""
    writer, row = ArtefactWriter(folder), model.architecture
    for i in range(model.blocks):
        block = model.load_block(i)
        _rotate_block(block, turns, model.prefix + row.layer.format(i))
        writer.add(f"block-{i:05d}", block.tensors())
        if tick:
            tick("quarot", i + 1, model.blocks)
    outer = {n: model.checkpoint.tensor(n) for n in model.outer_names()}
    config, R = copy.deepcopy(model.config), turns.stream
    if R is not None:
        table = outer[model.embed_name].float()
        outer[model.embed_name] = rotate_reader(table, R)
        if model.head_name is not None:
            head = table if model.tied else outer[model.head_name].float()
            if has_final_norm(row, model.config):
                name = f"{model.prefix}{row.final_norm}.weight"
                head = fold_gain(head, _gain(row.norm, outer[name].float()))
                outer[name] = _unit(row.norm, outer[name].float())
            outer[f"{row.head}.weight"] = rotate_reader(head, R)
            config.tie_word_embeddings = False
    finish_dense(model, config, writer, outer)
    return {"turned": {k: v.size for k, v in vars(turns).items() if v is not None}}


def _gain(norm: str, weight: Tensor) -> Tensor:
    return 1 + weight if norm == "rms+1" else weight


def _unit(norm: str, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if norm == "rms+1" else torch.ones_like(weight)


def _rotate_block(block: Block, turns: Turns, at: str) -> None:
    row, R = block.row, turns.stream
    by_stage = {s: [la for la in block.linears if la.stage == s] for s in range(4)}
    if R is not None:
        norms = {0: row.norm_attention, 2: row.norm_mlp}
        for stage, norm in norms.items():
            gain = _gain(row.norm, block.parameters[f"{at}{norm}.weight"])
            for la in by_stage[stage]:
                block.set_weight(la.name, rotate_reader(fold_gain(block.weight(la.name), gain), R))
        for norm in set(norms.values()):
            name = f"{at}{norm}.weight"
            block.set_parameter(name, _unit(row.norm, block.parameters[name]))
        for la in (*by_stage[1], *by_stage[3]):
            block.set_weight(la.name, rotate_writer(block.weight(la.name), R))
            bias = block.bias(la.name)
            if bias is not None:
                block.set_parameter(f"{la.name}.bias", R.apply(bias))
    if turns.values is not None:
        _rotate_values(block, turns)
    if turns.inner is not None:
        (down,) = by_stage[3]
        block.set_weight(down.name, turns.inner.apply(block.weight(down.name)))


def _rotate_values(block: Block, turns: Turns) -> None:
    R = turns.values
    assert R is not None
    by_role = {la.role: la.name for la in block.linears}
    name = by_role.get("v") or by_role["qkv"]
    rows = torch.arange(len(block.weight(name))) if "v" in by_role else value_rows(block.row, block.sizes)
    weight = block.weight(name).clone()
    turned, o = rotate_values(weight[rows], block.weight(by_role["o"]), R)
    weight[rows] = turned
    block.set_weight(name, weight)
    block.set_weight(by_role["o"], o)
    bias = block.bias(name)
    if bias is not None:
        bias = bias.clone()
        bias[rows] = R.apply(bias[rows].view(-1, R.size)).reshape(-1)
        block.set_parameter(f"{name}.bias", bias)


def finish_dense(model: Model, config: Any, writer: ArtefactWriter, outer: dict[str, Tensor]) -> None:
    """Close a dense checkpoint in float32 with what is outside of its blocks."""
    writer.add("outer", {n: (t.float() if t.is_floating_point() else t) for n, t in outer.items()})
    writer.finish(Written(config, model.checkpoint.copy_assets), torch.float32)  # type: ignore[arg-type]
