"""Targets of structured steps as parameters, bytes or measured latency: how much each kind of units must shrink.

A step says in which proportion its kinds shrink (``keep_heads``, ``keep_neurons`` …) and what the result must not exceed
(``target``: up to 1 a share of the dense model's, above it absolute, latency in microseconds; ``of``). The proportion is scaled until it fits:   keep_k(f) = 1 − f (1 − keep_k),   least f that meets the target.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..core import RecipeError
from ..models import Model
from .planning import estimate
from .recipe import Recipe, Step
from .shapes import Planned, full_shape, shape_after, structured_steps

_HALVINGS = 24


@dataclass
class LatencyTable:
    """Seconds that this machine takes for one token through a matrix (rows, columns), dense fp32, measured once a shape.

    A token's time is the sum over all linear layers and the head: attention over the past and norms are left out.
    """

    repeats: int = 15
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)

    def of(self, rows: int, columns: int) -> float:
        if (rows, columns) not in self.seconds:
            W, x = torch.randn(rows, columns), torch.randn(1, columns)
            times = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                F.linear(x, W)
                times.append(time.perf_counter() - start)
            self.seconds[rows, columns] = statistics.median(times)
        return self.seconds[rows, columns]

    def token(self, model: Model) -> float:
        layers = [la for i in range(model.blocks) for la in model.linears(i)]
        head = model.checkpoint.shape(model.head_name) if model.head_name else (0, 0)
        return sum(self.of(la.rows, la.columns) for la in layers) + (self.of(*head) if model.head_name else 0.0)


def with_targets(
    model: Model, recipe: Recipe, saved: Path | None = None, table: LatencyTable | None = None
) -> tuple[Recipe, list[dict[str, Any]]]:
    """``recipe`` with every target of a structured step turned into fractions to keep, and how, for the manifest.

    ``saved``: what an unfinished run has chosen; it is taken again, since a measured latency is never the same twice.
    Raises :class:`RecipeError` where the smallest shape is still too large.
    """
    before = json.loads(saved.read_text(encoding="utf-8")) if saved and saved.is_file() else []
    table = table or LatencyTable()
    record: list[dict[str, Any]] = []
    steps = list(recipe.steps)
    for number, step in enumerate(structured_steps(recipe)):
        if getattr(step.config, "target", None) is not None:
            index = next(i for i, s in enumerate(steps) if s is step)
            old = next((r for r in before if r["number"] == number), None)
            found: dict[str, Any] = old or _found(model, step, recipe, table) | {"number": number}
            record.append(found)
            steps[index] = step = _keeping(step, found["keep"])
        model = Model(Planned(model, step))
    return replace(recipe, steps=tuple(steps)), record


def _keeping(step: Step, keep: dict[str, float]) -> Step:
    return replace(step, config=replace(step.config, target=None, **{f"keep_{k}": v for k, v in keep.items()}))


def _found(model: Model, step: Step, recipe: Recipe, table: LatencyTable) -> dict[str, Any]:
    config, full = step.config, full_shape(model)
    shrink = {k: 1 - getattr(config, f"keep_{k}", 1.0) for k in full}
    shrink = {k: v for k, v in shrink.items() if v > 0}
    if not shrink:
        raise RecipeError(f"{step.name}: target needs a kind of units to remove; set one of its keep_… below 1")
    if config.target <= 0 or getattr(config, "spread", 0.0):
        raise RecipeError(
            f"{step.name}: target must be positive, and goes with the same width for all blocks (spread 0)"
        )
    size = _measure(config.of, recipe, table)
    dense = size(model)
    wanted = config.target * dense if config.target <= 1 else config.target / (1e6 if config.of == "latency" else 1)

    def at(f: float) -> tuple[float, dict[str, float]] | None:
        keep = {k: 1 - f * v for k, v in shrink.items()}
        try:
            shape = asdict(shape_after(model, _keeping(step, keep)))
        except RecipeError:
            return None
        exact = {k: shape[k] / full[k] for k in shrink}
        return size(Model(Planned(model, _keeping(step, keep)))), exact

    most = 1 / max(shrink.values())
    shape_after(model, _keeping(step, {k: 1 - v for k, v in shrink.items()}))  # what cannot be at all is said by it
    low, high, best, least = 0.0, most, None, None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        now = at(middle)
        if now is None and middle > 1:  # leaves none
            high = middle
        elif now is not None and now[0] <= wanted:
            high, best = middle, now
        else:
            low, least = middle, now or least
    if best is None:
        reached = f"; the smallest shape has {_spell(least[0], config.of)}" if least else ""
        raise RecipeError(
            f"{step.name}: no shape meets target {config.target:g} of {config.of} ({_spell(wanted, config.of)}){reached}. "
            "Raise target, or let other kinds shrink too (keep_heads, keep_neurons …)"
        )
    out = {"of": config.of, "dense": dense, "target": wanted, "planned": best[0], "keep": best[1]}
    if config.of == "latency":
        out["table"] = {f"{r}x{c}": s for (r, c), s in sorted(table.seconds.items())}
    return out


def _measure(of: str, recipe: Recipe, table: LatencyTable) -> Callable[[Model], float]:
    def size(model: Model) -> float:
        layers = [la for i in range(model.blocks) for la in model.linears(i)]
        return estimate(model, recipe, layers, 1)["size_bytes"]

    if of == "latency":
        return table.token
    return size if of == "bytes" else lambda model: float(model.parameters_count)


def _spell(value: float, of: str) -> str:
    return f"{value * 1e6:.1f} µs a token" if of == "latency" else f"{value:,.0f} {of}"
