"""Budgets: one pass over the dense blocks, and what an allocation measures on held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import BlockProblem, Both, Budget, LayerSummary, Problem, Solved, Stack, Stats, moved, on
from ..kernels.columns import column_loop
from ..methods.allocate.budget import at_least, in_groups
from ..models import Block, Linear, Model
from .blockwise import dense_targets, forward_of
from .data import CalibrationSet, embed
from .layers import constraint_for, wanted
from .planning import Plan, allocation_for, allocation_samples
from .recipe import Step
from .stream import Extras, histogram_bins, stacked_extras, stream_block
from .trials import Budgets, Memory, chain_loss, cheaper, trial_loss

Tick = Callable[[str, int, int], None]
_HELD_OUT = 8


def needs_held_out(plan: Plan) -> int:
    """Held-out windows that the plan wants: some when plans are to be compared by their loss, else none."""
    if plan.recipe.target:
        return _HELD_OUT
    compared = (getattr(s.config, "spread", None) == "auto" or "trials" in s.method.needs for s in plan.recipe.steps)
    return _HELD_OUT if any(compared) else 0


@torch.no_grad()
def budgets_for(
    model: Model,
    plan: Plan,
    data: CalibrationSet,
    tick: Tick | None = None,
    *,
    extras: Extras | None = None,
    floors: Budgets | None = None,
    folder: Path | None = None,
) -> tuple[Budgets, dict[str, Any]]:
    """A budget for each solver step that has an allocation before it, and a record of how it was found.

    ``extras``: what was gathered of gradients; ``floors``: budgets of an earlier shot, which no layer may fall below;
    ``folder``: where measured trials are kept, so that a killed search goes on.
    """
    budgets: Budgets = {}
    record: dict[str, Any] = {}
    for index, step in enumerate(plan.recipe.steps):
        allocation = allocation_for(plan.recipe, step) if step.method.kind == "solver" else None
        if allocation is None:
            continue
        target = step.constraint.target if step.constraint.prunes else float(step.constraint.bits)
        ids = data.ids[: allocation_samples(plan.recipe)]
        if allocation.method.learn is not None:
            summaries = learned(model, step, allocation, target, ids, tick)
        else:
            summaries = summarise(model, step, allocation, target, ids, tick, extras, data.watch)
        config, floor = allocation.config, (floors or {}).get(index)
        trials: dict[float, float] = {}
        more: dict[str, Any] = {}
        if "trials" in allocation.method.needs:
            memory = Memory(folder / f"trials-{index}.json" if folder else None)
            more["measure"] = _measure(model, step, allocation, data, tick, extras, memory, floor)
        if getattr(config, "spread", None) == "auto":
            for spread in config.spreads:
                budget = share(allocation, summaries, target, dataclasses.replace(config, spread=spread), step, floor)
                trials[spread] = trial_loss(
                    model, plan, {**budgets, index: budget}, data, tick, f"spread {spread:g}", extras
                )
            best = min(trials, key=lambda s: (trials[s], s))
            config = dataclasses.replace(config, spread=best)
        budgets[index] = share(allocation, summaries, target, config, step, floor, **more)
        record[step.name] = {
            "allocation": allocation.name,
            "target": target,
            "settings": dataclasses.asdict(config),
            "held_out_loss_by_spread": trials,
            "summaries": {s.name: dict(s.values) for s in summaries},
            "cluster": dict(budgets[index].cluster),
            "notes": dict(budgets[index].notes),
        }
    return budgets, record


def share(
    allocation: Step,
    summaries: list[LayerSummary],
    target: float,
    config: Any,
    step: Step,
    floor: Budget | None = None,
    **more: Any,
) -> Budget:
    """The allocation's budget: no layer below ``floor``, and in whole groups where ``step`` prunes N of M with N free."""
    budget = allocation.method.run(summaries, target, config, **more)
    return fitted(budget, summaries, target, step, floor)


def fitted(budget: Budget, summaries: list[LayerSummary], target: float, step: Step, floor: Budget | None) -> Budget:
    if budget.quantity != "sparsity":
        return budget
    if floor is not None:
        budget = at_least(budget, summaries, target, floor)
    m = step.constraint.free_m
    return in_groups(budget, summaries, target, m, floor) if m else budget


def _measure(
    model: Model,
    step: Step,
    allocation: Step,
    data: CalibrationSet,
    tick: Tick | None,
    extras: Extras | None,
    memory: Memory,
    floor: Budget | None,
) -> Callable[[Budget, list[LayerSummary], float, str], float]:
    """The held-out loss of the model under a budget, with the allocation's cheap method on few samples."""
    c = allocation.config
    cheap = cheaper(step, c.trial)
    few = dataclasses.replace(data, ids=data.ids[: c.trial_samples], held_out=data.held_out[: c.trial_windows])

    def measure(budget: Budget, summaries: list[LayerSummary], target: float, label: str) -> float:
        budget = fitted(budget, summaries, target, step, floor)
        return memory.recall(budget, lambda: chain_loss(model, [(cheap, budget)], few, tick, label, extras))

    return measure


def summarise(
    model: Model,
    step: Step,
    allocation: Step,
    target: float,
    ids: Tensor,
    tick: Tick | None = None,
    extras: Extras | None = None,
    watch: int | None = None,
) -> list[LayerSummary]:
    """One :class:`LayerSummary` for each layer that ``step`` touches, from a pass over the dense blocks."""
    method = allocation.method
    if method.summarise is None:
        layers = [la for i in range(model.blocks) for la in model.linears(i) if wanted(la, step.constraint)]
        return [_summary(layer, {}) for layer in layers]
    needs = method.needs | (step.method.needs if "score" in method.needs else frozenset())
    bins = histogram_bins([step] if "score" in method.needs else [])
    flows = needs & {"gram", "inputs"}
    hidden, out = (embed(model, ids) if flows else []), []
    for i in range(model.blocks):
        block = model.load_block(i)
        mine = extras(i) if extras else {}
        values: dict[str, float] = {}
        problems: list[Problem] = []
        members: list[Linear] = []

        def gather(
            stage: tuple[Linear, ...],
            stats: Stats,
            block: Block = block,
            problems: list = problems,
            members: list = members,
            mine: Mapping[str, Mapping[str, Tensor]] = mine,
        ) -> None:
            layers = [layer for layer in stage if wanted(layer, step.constraint)]
            if layers:
                problems.append(_problem(block, layers, stats, step, mine, "score" in method.needs))
                members.extend(layers)

        if flows:
            before = list(hidden)
            hidden = stream_block(block, hidden, gather, "gram" in needs, watch=watch, bins=bins, extras=mine)
            values = {"share": share_of_stream(before, hidden)}
        else:
            for stage in block.stages:
                gather(stage, Stats.empty(stage[0].columns, gram=False, device=block.device))
        with on(block.device):
            own = method.summarise(problems, target, allocation.config)
        out += [_summary(layer, values | v) for layer, v in zip(members, own, strict=True)]
        if tick:
            tick("allocate", i + 1, model.blocks)
    return out


def _problem(
    block: Block,
    layers: list[Linear],
    stats: Stats,
    step: Step,
    extras: Mapping[str, Mapping[str, Tensor]],
    scored: bool,
) -> Problem:
    """The layers of one stage under the step's pattern at its target, with its scores where they are asked for."""
    W = torch.cat([block.weight(layer.name) for layer in layers])
    parts = ((layer.rows, Both(constraint_for(layer, step.constraint, None).pattern)) for layer in layers)
    problem = Problem(W, stats, Stack(tuple(parts)), tuple(layer.name for layer in layers), loop=column_loop(W.device))
    if not scored:
        return problem
    assert step.method.score is not None
    problem = dataclasses.replace(problem, extras=moved(stacked_extras(layers, extras), W.device))
    with on(W.device):
        score = step.method.score(problem, step.config)
    return dataclasses.replace(problem, extras={**problem.extras, "score": score})


def learned(
    model: Model, step: Step, allocation: Step, target: float, ids: Tensor, tick: Tick | None = None
) -> list[LayerSummary]:
    """The same of an allocation that learns on whole blocks; each block sees what the pruned ones before it give."""
    assert allocation.method.learn is not None
    hidden, dense, out = embed(model, ids), embed(model, ids), []
    for i in range(model.blocks):
        block = model.load_block(i)
        layers = [la for la in block.linears if wanted(la, step.constraint)]
        inputs: dict[str, Stats] = {}

        def gather(stage: tuple[Linear, ...], stats: Stats, inputs: dict[str, Stats] = inputs) -> None:
            inputs.update({la.name: stats for la in stage})

        targets = dense_targets(block, dense)
        stream_block(block, list(hidden), gather, gram=False)
        start = {la.name: Solved(block.weight(la.name), None, None, torch.zeros(la.rows)) for la in layers}
        problem = BlockProblem(start, hidden, dense, targets, forward_of(block), i, inputs)
        with on(block.device):
            solved = allocation.method.learn(problem, target, allocation.config)
        for layer in layers:
            one = solved[layer.name]
            block.set_weight(layer.name, one.weight)
            out.append(_summary(layer, dict(one.notes)))
        hidden, dense = [block.forward(h) for h in hidden], targets
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
