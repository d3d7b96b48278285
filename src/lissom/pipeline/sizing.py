"""One budget: sparsity and bits of every layer, and the embedding's bits, from measured curves so that a target is met.

    1. curves     what each choice costs in bytes and in KL (:mod:`.curves`, :mod:`.prices`)
    2. plan       the Lagrangian over all hulls (:mod:`lissom.methods.allocate.spend`)
    3. trials     the plan is really run on the allocation's samples, once for each of ``tilts``, in memory; KL on held-out text
                  decides, and the bytes that the trial's codes take correct the prices

The second order of the curves overstates large losses and knows nothing of errors that feed on each other, so the loss that
is promised is a trial's, never the curves'. For ``max_kl`` the trials also calibrate the curves, KL ≈ a·S^p, until a plan
measures between 90% and 100% of the limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core import RecipeError
from ..evaluate import token_losses
from ..export import Layout, codec_named
from ..methods.allocate.spend import Option, hull, plan_size, reach
from ..models import Linear, Model
from . import gradients
from .artefact import artefact_dtype
from .curves import EMBEDDING, Options, budgets_of, embedding_options, layer_options, mean_kl, outer_as_saved, tilted
from .data import CalibrationSet
from .layers import wanted
from .planning import Plan, allocation_samples
from .prices import fixed_bytes, header_bytes, limits
from .recipe import Recipe
from .sections import Save
from .stream import LayerResult
from .target import parts
from .trials import Budgets, chain_of, trial
from .workdir import dump_json

Tick = Callable[[str, int, int], None]
Choice = dict[str, Option]
_TOLERANCE = 0.01
_MAX_TRIALS = 5  # for a loss, beyond those that choose the tilt


@dataclass(frozen=True)
class Trial:
    """A plan and what it came to: ``kl`` and ``loss`` (next-token, nats) on held-out text; ``bytes`` of its linear layers."""

    choice: Choice
    tilt: float
    predicted: float
    kl: float
    loss: float
    bytes: float


def check_target(model: Model, plan: Plan) -> None:
    """Refuse a size that no choice meets, before anything is measured."""
    target = plan.recipe.target
    wished = target.bytes(model.parameters_count) if target else None
    if target is None or wished is None:
        return
    zeros, codes = parts(plan.recipe.steps)
    step = plan.recipe.steps[codes]
    dtype = artefact_dtype(model, plan.recipe.save.dtype)
    low, high = limits(model, touched(model, plan), step.constraint, plan.recipe.save, zeros is not None, dtype)
    if not low * (1 - _TOLERANCE) <= wished <= high * (1 + _TOLERANCE):
        nearest = low if wished < low else high
        raise RecipeError(
            f"target: {_mb(wished)} cannot be met: this model can take {_mb(low)} to {_mb(high)} with {step.name}; "
            f"the nearest is --target-size {math.ceil(nearest / 1e3) if nearest == low else math.floor(nearest / 1e3)}kB "
            f"({8 * nearest / model.parameters_count:.2f} bits a weight)"
        )


def touched(model: Model, plan: Plan) -> list[Linear]:
    settings = plan.recipe.steps[parts(plan.recipe.steps)[1]].constraint
    return [la for i in range(model.blocks) for la in model.linears(i) if wanted(la, settings)]


def size_budgets(
    model: Model, plan: Plan, data: CalibrationSet, folder: Path, tick: Tick | None = None
) -> tuple[Budgets, dict[str, Any]]:
    """The budgets of the plan's solvers, and a record with what is expected of it (see :func:`expectation`)."""
    target = plan.recipe.target
    assert target is not None
    places = parts(plan.recipe.steps)
    step, save = plan.recipe.steps[places[1]], plan.recipe.save
    dtype = artefact_dtype(model, save.dtype)
    layers = touched(model, plan)
    samples = allocation_samples(plan.recipe)
    few = replace(data, ids=data.ids[:samples])
    embeddings, dense = embedding_options(model, save, data.held_out, dtype, tick)
    options = {EMBEDDING: embeddings} | layer_options(model, plan.recipe, data, samples, folder, tick)
    options = {name: hull(many) for name, many in options.items()}
    fixed = fixed_bytes(model, layers, dtype)
    last = max(1, model.blocks - 1)
    depth = {la.name: la.block / last for la in layers}
    codec, transposed = codec_named(save.format), model.architecture.transposed
    dense_loss = _loss(model, dense, data.held_out, None)

    def attempt(choice: Choice, tilt: float, number: int) -> Trial:
        path = folder / f"trial-{number}.json"
        asked = {"tilt": tilt, "choice": {n: [o.sparsity, o.bits] for n, o in choice.items()}}
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("asked") != asked:
            known = {"asked": asked, "found": tried(choice, number)}
            dump_json(path, known)
        return Trial(choice, tilt, _sum(choice), *known["found"])

    def tried(choice: Choice, number: int) -> tuple[float, float, float]:
        outer = outer_as_saved(model, replace(save, embedding_bits=choice[EMBEDDING].bits), dtype)
        size = 0

        def weigh(result: LayerResult) -> None:
            nonlocal size
            local = codec.encode(result.solved, Layout(dtype, result.pattern, transposed))
            size += sum(t.numel() * t.element_size() for t in local.values()) + header_bytes(
                result.layer.name, (result.layer.rows, result.layer.columns), local
            )

        chain = chain_of(plan, _budgets(choice, places))
        extras = partial(gradients.block_extras, folder)
        hidden = trial(model, chain, few, tick, f"trial {number}", outer, weigh, extras)
        kl = mean_kl(model, dense, hidden, outer)
        loss = _loss(model, hidden, data.held_out, outer)
        return kl, loss, float(size)

    trials: list[Trial] = []
    curves = {tilt: tilted(options, depth, tilt) for tilt in target.tilts}
    first = target.tilts[0]
    wished = target.bytes(model.parameters_count)
    found: Trial | None = None
    if wished is None:
        assert target.max_kl is not None
        found = _for_loss(target.max_kl, curves, trials, attempt)
        choice, bias = found.choice, found.bytes / _bytes(found.choice)
    elif target.measure:
        for tilt in target.tilts:
            planned = plan_size(curves[tilt], wished - fixed, _TOLERANCE / 2)
            trials.append(attempt(planned, tilt, len(trials) + 1))
        found = min(trials, key=lambda t: (t.kl, t.tilt))
        bias = found.bytes / _bytes(found.choice)
        choice = plan_size(_weighed(curves[found.tilt], bias), wished - fixed, _TOLERANCE / 2)
        choice = {n: replace(o, cost=o.cost / (1.0 if n == EMBEDDING else bias)) for n, o in choice.items()}
    else:
        choice, bias = plan_size(curves[first], wished - fixed, _TOLERANCE / 2), 1.0
    size = fixed + _bytes(choice) * bias + choice[EMBEDDING].cost
    record = {
        step.name: {
            "allocation": "target",
            "target": {
                k: list(v) if isinstance(v, tuple) else v for k, v in asdict(target).items() if v is not None
            },
            "embedding_bits": choice[EMBEDDING].bits,
            "expected_bytes": round(size),
            "expected_kl": found.kl if found else _sum(choice),
            "expected_loss": found.loss if found else None,
            "dense_loss": dense_loss,
            "measured": found is not None,
            "tilt": found.tilt if found else first,
            "held_out_tokens": data.held_out.numel(),
            "trials": [
                {
                    "tilt": t.tilt, "predicted": t.predicted, "kl": t.kl, "loss": t.loss,
                    "bytes": round(fixed + t.bytes + t.choice[EMBEDDING].cost),
                } for t in trials
            ],
            "layers": {
                n: {"sparsity": o.sparsity, "bits": o.bits, "bytes": round(o.cost), "kl": o.loss}
                for n, o in choice.items()
            },
        }
    }  # fmt: skip
    return _budgets(choice, places), record


def with_choice(plan: Plan, record: Mapping[str, Any]) -> Plan:
    """The plan with the sparsity and bits of every layer, and the size, as they were chosen."""
    chosen = next(iter(record.values()))
    layers = chosen["layers"]
    rows = tuple(
        row | {k: layers[row["name"]][k] for k in ("sparsity", "bits")} if row["name"] in layers else row
        for row in plan.layers
    )
    total = max(1, sum(row["weights"] for row in rows))
    facts = plan.model | {"planned_sparsity": sum(row["weights"] * row["sparsity"] for row in rows) / total}
    sizes = plan.estimates | {"size_bytes": float(chosen["expected_bytes"])}
    return replace(plan, layers=rows, model=facts, estimates=sizes, target=chosen)


def chosen_save(recipe: Recipe, record: Mapping[str, Any]) -> Save:
    """How to save, with the bits of the embedding that the target chose."""
    if recipe.target is None:
        return recipe.save
    return replace(recipe.save, embedding_bits=next(iter(record.values()))["embedding_bits"])


def _for_loss(
    limit: float, curves: Mapping[float, Options], trials: list[Trial], attempt: Callable[[Choice, float, int], Trial]
) -> Trial:
    """The smallest plan found whose measured KL is within ``limit``."""
    for tilt, options in curves.items():  # the same predicted loss in each; who measures least for its size goes on
        best = sum(min(o.loss for o in many) for many in options.values())
        trials.append(attempt(reach(options, max(limit, best)), tilt, len(trials) + 1))
    leader = min(trials, key=lambda t: (t.kl * _bytes(t.choice), t.tilt))
    options, points = curves[leader.tilt], [leader]
    for _ in range(_MAX_TRIALS):
        if any(0.9 * limit <= t.kl <= limit for t in points):
            break
        wanted_sum = _invert(points, 0.95 * limit)
        best = sum(min(o.loss for o in many) for many in options.values())
        choice = reach(options, max(wanted_sum, best))
        if any(choice == t.choice for t in points):
            break
        points.append(attempt(choice, leader.tilt, len(trials) + 1))
        trials.append(points[-1])
    met = [t for t in trials if t.kl <= limit]
    if not met:
        least = min(trials, key=lambda t: t.kl)
        raise RecipeError(
            f"target: a KL of {limit:g} cannot be met with these choices: the nearest that was measured on held-out text is "
            f"--max-kl {math.ceil(least.kl * 1e4) / 1e4:g}"
        )
    return min(met, key=lambda t: t.bytes + t.choice[EMBEDDING].cost)


def _invert(points: list[Trial], kl: float) -> float:
    """The sum S at which KL = a·S^p, fitted through the two measured points nearest to ``kl`` (p = 1 through one)."""
    near = sorted(points, key=lambda t: abs(math.log(max(t.kl, 1e-12) / kl)))[:2]
    a, p = near[0], 1.0
    if len(near) == 2 and abs(math.log(near[0].predicted / near[1].predicted)) > 1e-6:
        slope = math.log(max(near[0].kl, 1e-12) / max(near[1].kl, 1e-12))
        p = min(3.0, max(0.3, slope / math.log(near[0].predicted / near[1].predicted)))
    return a.predicted * (kl / max(a.kl, 1e-12)) ** (1 / p)


def expectation(r: Mapping[str, Any]) -> str:
    """What is expected of a target's choice (the record of one step), for people, before the first weight is written."""
    layers = [v for k, v in r["layers"].items() if k != EMBEDDING]
    bits = sorted({v["bits"] for v in layers})
    zeros = [v["sparsity"] for v in layers]
    how = (
        f"measured in a trial on {r['held_out_tokens']} held-out tokens"
        if r["measured"]
        else "predicted from the curves, no trial"
    )
    loss = (
        f", perplexity there {math.exp(r['dense_loss']):.4g} → {math.exp(min(r['expected_loss'], 700)):.4g}"
        if r["measured"]
        else ""
    )
    return (
        f"expected: {_mb(r['expected_bytes'])}, KL {r['expected_kl']:.4g} nats a token ({how}{loss}); "
        f"layers with {min(zeros):.0%} to {max(zeros):.0%} zeros in {'/'.join(map(str, bits))} bits, "
        f"embedding in {r['embedding_bits']} bits"
    )


def _budgets(choice: Choice, places: tuple[int | None, int]) -> Budgets:
    return budgets_of({n: o for n, o in choice.items() if n != EMBEDDING}, places)


def _bytes(choice: Choice) -> float:
    return sum(o.cost for n, o in choice.items() if n != EMBEDDING)


def _sum(choice: Choice) -> float:
    return sum(o.loss for o in choice.values())


def _weighed(options: Options, bias: float) -> Options:
    return {n: [o if n == EMBEDDING else replace(o, cost=o.cost * bias) for o in many] for n, many in options.items()}


def _loss(model: Model, hidden: torch.Tensor, ids: torch.Tensor, outer: Mapping[str, torch.Tensor] | None) -> float:
    losses = [token_losses(model, h[None], row, outer).mean() for h, row in zip(hidden, ids, strict=True)]
    return float(torch.stack(losses).mean())


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.2f} kB"
