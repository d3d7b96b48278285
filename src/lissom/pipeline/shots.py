"""Several shots: the sparsity is reached in passes over the whole model, each on what the last one left.

    share of shot k of N    linear k/N,  cubic 1 − (1 − k/N)³ (Zhu & Gupta 2017, arXiv 1710.01878)

Every shot but the last makes a dense checkpoint in float32 (``shots/`` of the working directory) from which the next one starts: its
statistics, gradients, scores and budgets are of the model as it is then. Zeros stay zeros (``within`` of the constraint),
weights that remain may move again, and grids come in the last shot. N:M goes from M:M to N:M.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..core import Budget
from ..export import ArtefactWriter, open_model
from ..export.writer import write_json
from ..models import Block, Model
from . import gradients
from .allocate import budgets_for
from .constraints import ConstraintSettings
from .data import CalibrationSet, embed
from .folding import finish_dense
from .planning import Plan
from .recipe import Step
from .stream import solve_blocks
from .trials import Budgets, chain_of

Tick = Callable[[str, int, int], None]


def shots_of(plan: Plan) -> int:
    """Passes over the model that the recipe asks for."""
    return max(
        (s.constraint.shots for s in plan.recipe.steps if s.method.kind == "solver" and s.constraint.prunes), default=1
    )


def at_share(settings: ConstraintSettings, shot: int) -> ConstraintSettings:
    """The constraint of shot number ``shot``, from 1: part of the zeros, no grid before the last."""
    if shot == settings.shots:
        return settings
    part = shot / settings.shots
    share = part if settings.schedule == "linear" else 1 - (1 - part) ** 3
    if settings.nm:
        n, m = settings.nm
        return replace(settings, pattern=f"{m - round(share * (m - n))}:{m}", sparsity=None, bits=16)
    return replace(settings, sparsity=share * (settings.sparsity or 0.0), bits=16)


def plan_of_shot(plan: Plan, shot: int) -> Plan:
    """The plan with its pruning steps at the sparsity of one shot; other solver steps keep their place without a grid."""

    def turned(step: Step) -> Step:
        c = step.constraint
        if step.method.kind != "solver":
            return step
        return replace(step, constraint=at_share(c, shot) if c.prunes else replace(c, bits=16))

    return replace(plan, recipe=replace(plan.recipe, steps=tuple(turned(s) for s in plan.recipe.steps)))


@torch.no_grad()
def earlier_shots(
    model: Model, plan: Plan, data: CalibrationSet, folder: Path, tick: Tick | None = None
) -> tuple[Model, Budgets]:
    """The model after all shots but the last, and the budgets of the last of these; itself where there is one shot.

    A shot that is complete on disk is not done again; one that was killed starts again.
    """
    last, floors = shots_of(plan) - 1, {}
    complete = max((k for k in range(1, last + 1) if (folder / str(k) / "shot.json").exists()), default=0)
    if complete:
        model, floors = _reopened(model, folder / str(complete))
    for shot in range(complete + 1, last + 1):
        place = folder / str(shot)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        made = _shoot(model, plan_of_shot(plan, shot), data, place, floors, tick, f"shot {shot}")
        write_json(place / "shot.json", made)
        model, floors = _reopened(model, place)
        shutil.rmtree(folder / str(shot - 1), ignore_errors=True)
    return model, floors


def _reopened(model: Model, place: Path) -> tuple[Model, Budgets]:
    after = Model(open_model(place), device=model.device)
    after.operators = model.operators
    saved = json.loads((place / "shot.json").read_text(encoding="utf-8"))
    return after, {int(i): Budget(**b) for i, b in saved.items()}


def _shoot(
    model: Model, plan: Plan, data: CalibrationSet, folder: Path, floors: Budgets, tick: Tick | None, label: str
) -> dict[str, Any]:
    """Write the model after one shot into ``folder``; its budgets as plain data."""
    extras = gradients.for_recipe(model, data.ids, folder, plan.recipe, tick)
    budgets, _ = budgets_for(model, plan, data, tick, extras=extras, floors=floors, folder=folder)
    writer = ArtefactWriter(folder)

    def keep(i: int, block: Block) -> None:
        writer.add(f"block-{i:05d}", {k: v.contiguous() for k, v in block.tensors().items()})

    solve_blocks(
        model,
        embed(model, data.ids),
        chain_of(plan, budgets),
        extras=extras,
        watch=data.watch,
        at_once=data.at_once,
        keep=keep,
        tick=(lambda d, n: tick(label, d, n)) if tick else None,
    )
    for file in folder.glob("gradients-*.safetensors"):
        file.unlink()
    finish_dense(model, model.config, writer, {n: model.checkpoint.tensor(n) for n in model.outer_names()})
    return {str(i): asdict(b) for i, b in budgets.items()}
