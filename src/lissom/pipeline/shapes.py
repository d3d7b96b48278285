"""Shapes of smaller models: what a structured step will leave, known before any weight is read.

Configs of transformers hold one number of heads and neurons for all blocks, in every architecture of the table. So either
all blocks keep the same number, or (``spread``) they differ and are saved as wide as the widest may be, with zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import RecipeError
from ..models import Model
from ..models.layout import Sizes, block_parts, outer_parts
from ..models.units import KINDS, refusal, smaller_config
from .healing import teacher_problems
from .permutation import pattern_of
from .planning import Plan, make_plan
from .recipe import STRUCTURED, TRAINED, Recipe, Step

_MULTIPLE = 32  # neurons that remain are a multiple of this, so that groups of quantization and SIMD lanes fit


def structured_steps(recipe: Recipe) -> list[Step]:
    return [s for s in recipe.steps if s.method.kind in STRUCTURED]


@dataclass(frozen=True)
class Shape:
    """What remains in every block: KV ``heads`` (with their query heads), ``neurons``; how many ``blocks``; and ``channels``
    of the hidden state."""

    heads: int
    neurons: int
    blocks: int
    channels: int


def shape_after(model: Model, step: Step) -> Shape:
    """The shape that a step leaves; raises :class:`RecipeError` where no legal one is near, or transformers has none."""
    full = full_shape(model)
    left = dict(full)
    problems = []
    if not 0 <= getattr(step.config, "spread", 0.0) < 1:
        raise RecipeError(f"{step.name}: spread must be at least 0 and below 1, not {step.config.spread:g}")
    for kind, all_of in full.items():
        share = getattr(step.config, f"keep_{kind}", 1.0)
        if not 0 < share <= 1:
            problems.append(f"{step.name}: keep_{kind} must be above 0 and at most 1, not {share:g}")
            continue
        multiple = multiple_of(kind, all_of, model, left["heads"])
        count = round(share * all_of / multiple) * multiple
        if count < 1:
            problems.append(
                f"{step.name}: keep_{kind} {share:g} of {all_of} leaves none; the least is {multiple / all_of:.3g}"
            )
        elif count < all_of:
            reason = refusal(model.architecture, model.config, kind) or _no_gates(model, step, kind)
            if reason:
                problems.append(f"{step.name}: {kind} cannot be removed from {reason}; set keep_{kind}=1")
        left[kind] = _widest(step, kind, count, all_of, multiple)
    if left == full and not problems:
        able = ", ".join(f"keep_{k}" for k in full if hasattr(step.config, f"keep_{k}"))
        spread = " (spread makes the widest block as wide as before)" if getattr(step.config, "spread", 0) else ""
        problems.append(f"{step.name}: nothing is removed{spread}; set one of {able} lower")
    if not problems:
        problems += _refused(model, step, left)
    if step.method.kind in TRAINED and not model.has_head:
        problems.append(f"{step.name} trains on next tokens, which needs a language-model head; this model has none")
    if problems:
        raise RecipeError(problems)
    return Shape(**left)


def _refused(model: Model, step: Step, left: dict[str, int]) -> list[str]:
    """What transformers has against a config of this shape: some want a width that the query heads divide."""
    row, s = model.architecture, Sizes.of(model.architecture, model.config)
    new = smaller_config(row, model.config, left["heads"], left["neurons"], range(left["blocks"]), left["channels"])
    try:
        type(new).from_dict(new.to_dict())
    except Exception as error:  # validators of configs raise classes of their own
        per = s.heads // s.kv_heads
        fit = [h for h in range(1, s.kv_heads + 1) if left["channels"] % (h * per) == 0]
        shares = ", ".join(f"{h / s.kv_heads:.3g}" for h in fit)
        reason = " ".join(str(error).split())
        return [
            f"{step.name}: transformers has no {row.name} with {left['heads'] * per} query heads over {left['heads']} KV "
            f"heads and a width of {left['channels']} ({reason}); keep_heads may be {shares}"
        ]
    return []


def _widest(step: Step, kind: str, count: int, all_of: int, multiple: int) -> int:
    """Units that the widest block may keep, where blocks may differ."""
    spread = getattr(step.config, "spread", 0.0) if kind in KINDS and count < all_of else 0.0
    return min(all_of, count + math.ceil(spread * all_of / multiple) * multiple) if spread else count


def mean_shape(model: Model, step: Step) -> Shape:
    """Units that a block keeps on average: :func:`shape_after` without ``spread``."""
    even = hasattr(step.config, "spread")
    return shape_after(model, replace(step, config=replace(step.config, spread=0.0, search=0)) if even else step)


def full_shape(model: Model) -> dict[str, int]:
    """Kind → units of the model as it is: KV heads and neurons of a block, blocks, channels."""
    s = Sizes.of(model.architecture, model.config)
    return {"heads": s.kv_heads, "neurons": s.inner, "blocks": model.blocks, "channels": s.width}


def multiple_of(kind: str, all_of: int, model: Model, heads: int) -> int:
    """What the number that remains is a multiple of; configs of transformers want a width that its query heads divide."""
    if kind not in ("neurons", "channels"):
        return 1
    multiple = _MULTIPLE if all_of % _MULTIPLE == 0 and all_of >= 4 * _MULTIPLE else 1
    if kind == "channels":
        s = Sizes.of(model.architecture, model.config)
        multiple = math.lcm(multiple, s.heads // s.kv_heads * max(heads, 1))
        multiple = multiple if all_of % multiple == 0 else all_of
    return multiple


def _no_gates(model: Model, step: Step, kind: str) -> str | None:
    """Why gates of this kind would not do what the removal does, or None."""
    row = model.architecture
    if step.method.kind != "gates" or kind not in ("blocks", "channels"):
        return None
    if row.norm_attention_out:
        return f"{row.name} by gates: its norms behind each branch undo them"
    if not row.setting(model.config, "pre_norm"):
        return f"{row.name} by gates: its norms stand behind the addition"
    return None


class Planned:
    """A checkpoint that does not exist yet: config, names and shapes of what a structured step will make of ``model``."""

    format = "planned"

    def __init__(self, model: Model, step: Step):
        shape = shape_after(model, step)
        row, old = model.architecture, model.checkpoint
        self.source, self._old = old.source, old
        self.config = smaller_config(row, model.config, shape.heads, shape.neurons, range(shape.blocks), shape.channels)
        present = set(old.names())
        expected = {p.name: p.shape for p in outer_parts(row, self.config, model.prefix, bare=True)}
        self._shapes = {n: expected.get(n, tuple(old.shape(n))) for n in model.outer_names()}
        for i in range(shape.blocks):
            for part in block_parts(row, self.config, model.prefix, i):
                if part.name in present:
                    self._shapes[part.name] = part.shape

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._old.dtype(name)

    @property
    def bytes(self) -> int:
        return sum(torch.Size(s).numel() * self.dtype(n).itemsize for n, s in self._shapes.items())

    def problems(self) -> list[str]:
        return []

    def tokenizer(self) -> Any:
        return self._old.tokenizer()

    def fingerprint(self) -> str:
        return self._old.fingerprint()

    def copy_assets(self, out: Path) -> None:
        self._old.copy_assets(out)

    def tensor(self, name: str) -> Tensor:
        raise ValueError(f"{name} is only planned: its weights do not exist yet")


def planned_model(model: Model, recipe: Recipe) -> Model:
    """``model`` as the recipe's structured steps will leave it, without weights; itself when there are none."""
    for step in recipe.steps:
        if step.method.kind == "permutation":
            pattern_of(model, step, recipe)
        elif step.method.kind in STRUCTURED:
            model = Model(Planned(model, step))
    return model


def widths_notes(model: Model, recipe: Recipe) -> list[str]:
    """How each structured step saves the widths of blocks, in words."""
    out = []
    for step in structured_steps(recipe):
        if step.method.kind != "blocks":
            full, mean, saved = full_shape(model), mean_shape(model, step), shape_after(model, step)
            for kind in KINDS:
                left, widest = getattr(mean, kind), getattr(saved, kind)
                if left < full[kind]:
                    how = (
                        f"the same {left} of {full[kind]} in every block"
                        if widest == left
                        else f"{left} of {full[kind]} on average, every block saved with {widest}, the rest zeros"
                    )
                    out.append(f"{step.name}: {kind}: {how} ({model.architecture.name} has one width for all blocks)")
        model = Model(Planned(model, step))
    return out


def structured_plan(model: Model, recipe: Recipe, out: Path | None = None) -> Plan:
    """The plan of a recipe whose structured steps come first, with how they save widths among its warnings."""
    small = planned_model(model, recipe)
    made = make_plan(small, recipe, out)
    problems = teacher_problems(model, small, recipe)
    if problems:
        raise RecipeError(problems)
    return replace(made, warnings=(*widths_notes(model, recipe), *made.warnings))
