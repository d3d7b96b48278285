"""Budgets: one pass over the dense blocks, and the choice of the spread on held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import Both, Budget, LayerSummary, Problem, Stack
from ..evaluate import token_losses
from ..methods.allocate.budget import in_groups
from ..models import Linear, Model
from .data import CalibrationSet, embed
from .layers import wanted
from .planning import Plan, allocation_for, allocation_samples
from .recipe import Step
from .stream import LayerResult, solve_stage, stream_block

Tick = Callable[[str, int, int], None]
Budgets = dict[int, Budget]  # by index of the solver step in the recipe
_HELD_OUT = 8


def needs_held_out(plan: Plan) -> int:
    """Held-out windows that the plan wants: some when a spread is to be chosen, else none."""
    if plan.recipe.target:
        return _HELD_OUT
    return _HELD_OUT if any(getattr(s.config, "spread", None) == "auto" for s in plan.recipe.steps) else 0


@torch.no_grad()
def budgets_for(
    model: Model, plan: Plan, data: CalibrationSet, tick: Tick | None = None
) -> tuple[Budgets, dict[str, Any]]:
    """A budget for each solver step that has an allocation before it, and a record of how it was found."""
    budgets: Budgets = {}
    record: dict[str, Any] = {}
    for index, step in enumerate(plan.recipe.steps):
        allocation = allocation_for(plan.recipe, step) if step.method.kind == "solver" else None
        if allocation is None:
            continue
        target = step.constraint.target if step.constraint.prunes else float(step.constraint.bits)
        summaries = summarise(model, step, allocation, target, data.ids[: allocation_samples(plan.recipe)], tick)
        config = allocation.config
        trials: dict[float, float] = {}
        if getattr(config, "spread", None) == "auto":
            for spread in config.spreads:
                budget = share(allocation, summaries, target, dataclasses.replace(config, spread=spread), step)
                trials[spread] = trial_loss(model, plan, {**budgets, index: budget}, data, tick, f"spread {spread:g}")
            best = min(trials, key=lambda s: (trials[s], s))
            config = dataclasses.replace(config, spread=best)
        budgets[index] = share(allocation, summaries, target, config, step)
        record[step.name] = {
            "allocation": allocation.name,
            "target": target,
            "settings": dataclasses.asdict(config),
            "held_out_loss_by_spread": trials,
            "summaries": {s.name: dict(s.values) for s in summaries},
            "cluster": dict(budgets[index].cluster),
        }
    return budgets, record


def share(allocation: Step, summaries: list[LayerSummary], target: float, config: Any, step: Step) -> Budget:
    """The allocation's budget, in whole groups where ``step`` prunes N of M with N free."""
    budget, m = allocation.method.run(summaries, target, config), step.constraint.free_m
    return in_groups(budget, summaries, target, m) if m and budget.quantity == "sparsity" else budget


def summarise(
    model: Model, step: Step, allocation: Step, target: float, ids: Tensor, tick: Tick | None = None
) -> list[LayerSummary]:
    """One :class:`LayerSummary` for each layer that ``step`` touches, from a pass over the dense blocks."""
    method = allocation.method
    if method.summarise is None:
        layers = [la for i in range(model.blocks) for la in model.linears(i) if wanted(la, step.constraint)]
        return [_summary(layer, {}) for layer in layers]
    hidden, out = (embed(model, ids) if method.needs else []), []
    for i in range(model.blocks):
        block = model.load_block(i)
        values: dict[str, float] = {}
        problems: list[Problem] = []
        members: list[Linear] = []

        def gather(
            stage: tuple[Linear, ...],
            stats: Any,
            block: Any = block,
            problems: list = problems,
            members: list = members,
        ) -> None:
            layers = [layer for layer in stage if wanted(layer, step.constraint)]
            if layers:
                W = torch.cat([block.weight(layer.name) for layer in layers])
                stack = Stack(tuple((layer.rows, Both()) for layer in layers))
                problems.append(Problem(W, stats, stack, tuple(layer.name for layer in layers)))
                members.extend(layers)

        if method.needs:
            before = list(hidden)
            hidden = stream_block(block, hidden, gather, "gram" in method.needs)
            values = {"share": share_of_stream(before, hidden)}
        else:
            from ..core import Stats

            for stage in block.stages:
                gather(stage, Stats.empty(stage[0].columns, gram=False))
        own = method.summarise(problems, target, allocation.config)
        out += [_summary(layer, values | v) for layer, v in zip(members, own, strict=True)]
        if tick:
            tick("allocate", i + 1, model.blocks)
    return out


def share_of_stream(before: list[Tensor], after: list[Tensor]) -> float:
    """Median over tokens of ‖h_out − h_in‖² / ‖h_out‖²: the part of the residual stream that a block wrote itself.

    The median, because a few tokens (the first of a text above all) carry norms hundreds of times larger.
    """
    parts = [
        ((b - a).square().sum(-1) / b.square().sum(-1).clamp_min(torch.finfo(b.dtype).tiny)).flatten()
        for a, b in zip(before, after, strict=True)
    ]
    return float(torch.cat(parts).median())


def _summary(layer: Linear, values: Mapping[str, float]) -> LayerSummary:
    return LayerSummary(layer.name, layer.block, layer.role, layer.rows, layer.columns, values)


def trial_loss(
    model: Model, plan: Plan, budgets: Budgets, data: CalibrationSet, tick: Tick | None = None, label: str = "trial"
) -> float:
    """Mean next-token loss (nats) on the held-out windows of a model compressed under ``budgets``; nothing is written."""
    final = trial(model, plan, budgets, data, tick, label)
    losses = [token_losses(model, h[None], row).mean() for h, row in zip(final, data.held_out, strict=True)]
    return float(torch.stack(losses).mean())


def trial(
    model: Model,
    plan: Plan,
    budgets: Budgets,
    data: CalibrationSet,
    tick: Tick | None = None,
    label: str = "trial",
    outer: Mapping[str, Tensor] | None = None,
    visit: Callable[[LayerResult], None] | None = None,
) -> Tensor:
    """Hidden states of the held-out windows after the last compressed block, (windows, tokens, width).

    The held-out windows stream along through the compressed blocks and never feed the statistics. ``outer``: tensors to embed with
    instead of the model's own; ``visit`` sees every solved layer.
    """
    ids = data.ids[: allocation_samples(plan.recipe)]
    batches = embed(model, ids, outer)
    watch = len(batches)
    hidden = batches + embed(model, data.held_out, outer)
    steps = [(s, budgets.get(i)) for i, s in enumerate(plan.recipe.steps) if s.method.kind == "solver"]
    gram = any("gram" in s.method.needs for s, _ in steps)
    for i in range(model.blocks):
        block = model.load_block(i)

        def solve(stage: tuple[Linear, ...], stats: Any, block: Any = block) -> None:
            weights = {layer.name: block.weight(layer.name) for layer in stage}
            for result in solve_stage(stage, weights, stats, steps):
                block.set_weight(result.layer.name, result.solved.weight)
                if visit:
                    visit(result)

        at_once = plan.recipe.calibration.statistics == "block"
        hidden = stream_block(block, hidden, solve, gram, watch=watch, at_once=at_once)
        if tick:
            tick(label, i + 1, model.blocks)
    return torch.cat(hidden[watch:])
