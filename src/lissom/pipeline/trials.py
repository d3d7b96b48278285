"""Trials: a model compressed in memory under some budgets, and what it then loses on held-out calibration text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Budget
from ..evaluate import token_losses
from ..methods import METHODS
from ..models import Model
from .data import CalibrationSet, embed
from .planning import Plan, allocation_samples
from .recipe import Step
from .stream import Extras, LayerResult, solve_blocks
from .workdir import dump_json

Tick = Callable[[str, int, int], None]
Budgets = dict[int, Budget]  # by index of the solver step in the recipe
Chain = Sequence[tuple[Step, Budget | None]]


def chain_of(plan: Plan, budgets: Budgets) -> Chain:
    """The solver steps with their budgets."""
    return [(s, budgets.get(i)) for i, s in enumerate(plan.recipe.steps) if s.method.kind == "solver"]


def trial_loss(
    model: Model,
    plan: Plan,
    budgets: Budgets,
    data: CalibrationSet,
    tick: Tick | None = None,
    label: str = "trial",
    extras: Extras | None = None,
) -> float:
    """Mean next-token loss (nats) on the held-out windows of a model compressed under ``budgets``; nothing is written."""
    few = replace(data, ids=data.ids[: allocation_samples(plan.recipe)])
    return chain_loss(model, chain_of(plan, budgets), few, tick, label, extras, plan.recipe.calibration.drift)


def chain_loss(
    model: Model,
    chain: Chain,
    data: CalibrationSet,
    tick: Tick | None = None,
    label: str = "trial",
    extras: Extras | None = None,
    drift: float = 0.0,
) -> float:
    """The same of any chain of steps, with all samples of ``data``."""
    final = trial(model, chain, data, tick, label, extras=extras, drift=drift)
    losses = [token_losses(model, h[None], row).mean() for h, row in zip(final, data.held_out, strict=True)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def trial(
    model: Model,
    chain: Chain,
    data: CalibrationSet,
    tick: Tick | None = None,
    label: str = "trial",
    outer: Mapping[str, Tensor] | None = None,
    visit: Callable[[LayerResult], None] | None = None,
    extras: Extras | None = None,
    drift: float = 0.0,
) -> Tensor:
    """Hidden states of the held-out windows after the last compressed block, (windows, tokens, width).

    The held-out windows stream along through the compressed blocks and never feed the statistics. ``outer``: tensors to embed with
    instead of the model's own; ``visit`` sees every solved layer.
    """
    batches = embed(model, data.ids, outer)
    watch = len(batches)
    hidden = solve_blocks(
        model,
        batches + embed(model, data.held_out, outer),
        chain,
        extras=extras,
        watch=watch,
        at_once=data.at_once,
        visit=visit,
        drift=drift,
        tick=(lambda done, total: tick(label, done, total)) if tick else None,
    )
    return torch.cat(hidden[watch:])


def cheaper(step: Step, method: str) -> Step:
    """The step's constraint without its grid, met by another method with its default settings."""
    cheap = METHODS[method]
    per: Any = "layer" if step.constraint.unit != "element" else cheap.comparison
    return Step(cheap, cheap.config(), replace(step.constraint, bits=16, per=per))


@dataclass(frozen=True)
class Memory:
    """Losses that were measured before, kept in a file so that a killed search goes on where it was."""

    file: Path | None = None

    def recall(self, budget: Budget, measure: Callable[[], float]) -> float:
        key = json.dumps({k: round(v, 12) for k, v in sorted(budget.values.items())})
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file and self.file.exists() else {}
        if key not in known:
            known[key] = measure()
            if self.file:
                dump_json(self.file, known)
        return known[key]
