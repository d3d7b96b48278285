"""Widths of blocks found by measuring: the predictor search of plans, over units instead of weights.

A plan says how many heads or neurons every block keeps; the units with the least scores of the dense blocks are masked, and the
next-token loss of the calibration samples is the plan's cost. Kinds are searched one after the other. The plan with equal
widths is measured first, so that on these samples the result is never worse than it.
Source: Ji, Cao, Liu 2023 (arXiv 2309.09507), see :mod:`lissom.methods.allocate.predictor_search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Budget, LayerSummary
from ..methods.allocate.predictor_search import PredictorSearch, predictor_search
from ..methods.heal.losses import next_token
from ..models import Model
from ..models.units import masked, units_of

_SAMPLES = 8  # windows that a plan is measured on
Tick = Callable[[str, int, int], None]
Plan = dict[str, list[int]]  # kind → units that each block keeps


@torch.no_grad()
def loss_of(model: Model, plan: Mapping[str, Sequence[int]], order: Mapping[str, Tensor], ids: Tensor) -> float:
    """Mean next-token loss on ``ids`` (samples, tokens) without the units behind the first ``plan[kind][block]`` of
    ``order[kind]`` (blocks, units), best first."""
    hidden = model.embed(ids)
    for i in range(model.blocks):
        block = model.load_block(i)
        for kind, counts in plan.items():
            units = units_of(block.row, block.config, block.linears, kind)
            block.parameters = masked(block.parameters, units, order[kind][i, : counts[i]].sort().values)
        hidden = block.forward(hidden)
    return sum(float(next_token(model.head(h[None]), x[None])) for h, x in zip(hidden, ids, strict=True)) / len(ids)


def counts_of(shares: Sequence[float], count: int, mean: int, low: int, high: int) -> list[int]:
    """Whole numbers of units near ``shares`` of ``count`` (fractions that go), between ``low`` and ``high``; their mean is exact."""
    wanted = [(1 - s) * count for s in shares]
    out = [min(max(int(w), low), high) for w in wanted]
    while (missing := mean * len(out) - sum(out)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, n in enumerate(out) if low <= n + step <= high]
        able.sort(key=lambda i: step * (out[i] - wanted[i]))
        for i in able[: abs(missing)]:
            out[i] += step
    return out


def searched(
    model: Model,
    scores: Mapping[str, Tensor],
    mean: Mapping[str, int],
    high: Mapping[str, int],
    ids: Tensor,
    plans: int,
    tick: Tick | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The best plan for ``scores`` (kind → (blocks, units)), and how it was found, for the manifest."""
    ids = ids[:_SAMPLES]
    order = {k: s.argsort(dim=1, descending=True, stable=True) for k, s in scores.items()}
    plan: Plan = {k: [mean[k]] * model.blocks for k in scores}
    record: dict[str, Any] = {}
    for kind, ranked in order.items():
        count, low = ranked.shape[1], max(1, 2 * mean[kind] - high[kind])
        if not mean[kind] < high[kind] or mean[kind] == count:
            continue
        names = [f"block {i}" for i in range(model.blocks)]
        layers = [LayerSummary(n, i, kind, count, 1) for i, n in enumerate(names)]
        config = PredictorSearch(
            plans=plans, rounds=1, verify=max(2, plans // 8), spread=(high[kind] - mean[kind]) / count
        )

        def measure(budget: Budget, layers: Sequence[LayerSummary], target: float, label: str) -> float:
            counts = counts_of([budget.values[n] for n in names], count, mean[kind], low, high[kind])  # noqa: B023
            if tick:
                tick(f"{kind}: {label}", 0, 1)  # noqa: B023
            return loss_of(model, plan | {kind: counts}, order, ids)  # noqa: B023

        found = predictor_search(layers, 1 - mean[kind] / count, config, measure)
        plan[kind] = counts_of([found.values[n] for n in names], count, mean[kind], low, high[kind])
        record[kind] = {**found.notes, "counts": plan[kind]}
    return plan, record
