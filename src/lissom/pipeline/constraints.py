"""The constraint's settings, which every solver step shares, and what can be said of them without a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .recipe import Recipe, Step

_UNITS = {"element": (1, 1), "row": (1, 0), "column": (0, 1)}


@dataclass(frozen=True)
class ConstraintSettings:
    """Settings that every solver shares.

    ``sparsity`` in [0, 1) or None; ``pattern`` "unstructured", "N:M" (then sparsity follows), "n:16" (N chosen for
    each layer by the allocation), or "n:16 by row" (N chosen for each row by what it loses); ``per`` "layer", "row" or "global" (one threshold over all layers);
    ``unit`` of weights that go together: "element", "row", "column", or a block such as "4x1" (rows x inputs);
    ``shots``: passes over the model in which the sparsity is reached, by ``schedule`` linear|cubic, statistics and scores taken anew
    in each; ``row_fisher``: the exponent to which rows' scores are multiplied by the power E[g²] of the loss's gradient at their
    output, over the layer's mean; 0 compares rows by their own error; ``bits`` 2–8, 16 = not quantized; ``group_size`` inputs per scale, 0 = one scale per output row;
    ``symmetric``; ``range`` minmax|mse; ``only``/``ignore``: regular expressions on layer names or roles.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    per: Literal["layer", "row", "global"] | None = None
    unit: str = "element"
    shots: int = 1
    schedule: Literal["linear", "cubic"] = "linear"
    row_fisher: float = 0.0
    bits: int = 16
    group_size: int = 128
    symmetric: bool = False
    range: Literal["minmax", "mse"] = "minmax"
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def nm(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def free_m(self) -> int | None:
        """M of "n:M", a pattern whose N the allocation chooses for each layer."""
        match = re.fullmatch(r"n:(\d+)", self.pattern)
        return int(match[1]) if match else None

    @property
    def row_m(self) -> int | None:
        """M of "n:M by row", a pattern whose N is chosen for each row."""
        match = re.fullmatch(r"n:(\d+) by row", self.pattern)
        return int(match[1]) if match else None

    @property
    def group(self) -> int | None:
        """M of any pattern of N of M."""
        return self.nm[1] if self.nm else self.free_m or self.row_m

    @property
    def shape(self) -> tuple[int, int] | None:
        """(rows, columns) of a unit, 0 for all; None when ``unit`` is none."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.unit)
        return (int(match[1]), int(match[2])) if match else _UNITS.get(self.unit)

    @property
    def prunes(self) -> bool:
        return bool(self.sparsity) or self.nm is not None

    @property
    def target(self) -> float:
        """The fraction of zeros that the step asks for."""
        return 1 - self.nm[0] / self.nm[1] if self.nm else (self.sparsity or 0.0)


def pruning_problems(step: Step, allocation: Step | None, before: Sequence[Step]) -> Iterator[str]:
    """What does not go together in ``unit``, ``per`` and ``shots`` of a solver step; ``allocation``: the one before it."""
    c, method = step.constraint, step.method
    pruned = [s for s in before if s.method.kind == "solver" and s.constraint.prunes]
    odd = [s.constraint.unit for s in pruned if s.constraint.unit != "element"]
    if "exchanges" in method.makes and odd:
        yield f"{step.name} exchanges single weights, which breaks units of {odd[0]}; leave it out"
    if not c.prunes:
        return
    if c.shape is None:
        yield f"unit must be element, row, column, or a block of rows x inputs such as 4x1 or 1x16, not {c.unit!r}"
    elif c.shape != (1, 1):
        if c.pattern != "unstructured":
            yield f"unit {c.unit} and pattern {c.pattern} are two patterns; leave one of them"
        if c.per == "row" and c.shape[1] == 0:
            yield "per row compares parts of a row, and unit row has none; leave out per"
        if "single" in method.makes:
            yield f"{step.name} removes one weight at a time; use unit=element or another method"
    if allocation is not None and "score" in allocation.method.needs and method.score is None:
        yield f"{step.name} chooses by no score that layers could be compared by; leave out per: global ({allocation.name})"
    if c.row_m and c.per == "row":
        yield f"pattern {c.pattern} chooses how much each row keeps, and per row keeps as much in each; leave out per"
    if c.row_fisher < 0:
        yield f"row_fisher must be at least 0, not {c.row_fisher:g}"
    elif c.row_fisher and (c.nm or c.free_m or c.per == "row"):
        kept = c.pattern if c.nm or c.free_m else "per row"
        yield f"row_fisher compares rows, and {kept} keeps as much in each of them; leave out row_fisher" + (
            "" if c.nm or c.free_m else ", or set per=layer"
        )
    if c.shots < 1:
        yield f"shots must be 1 or more, not {c.shots}"
    if c.shots > 1 and "factors" in method.makes:
        yield f"{step.name} makes a sum that has no zeros to go on from; use shots=1"
    if any((s.constraint.shots, s.constraint.schedule) != (c.shots, c.schedule) for s in pruned):
        yield "every pruning step of a recipe needs the same shots and schedule, because all run in the same passes"


def textless_problems(recipe: Recipe) -> Iterator[str]:
    """What cannot be done without calibration text."""
    able = {"solver", "allocation", "permutation", "rotation", "operator"}
    for step in recipe.steps:
        static = step.method.kind == "operator" and getattr(step.config, "static", False)
        learns = not step.method.needs <= {"gram", "inputs", "entropy", "score"} or step.constraint.row_fisher
        if step.method.kind not in able or static or learns:
            yield (
                f"calibration: {step.name} learns from text, and data is none; give text, or leave the step out "
                "(statistics of inputs can be taken as white, losses and gradients cannot)"
            )
        if getattr(step.config, "spread", None) == "auto":
            yield f"{step.name}: spread auto is measured on held-out text, and data is none; give a number"
    if recipe.calibration.token_fisher:
        yield "calibration: token_fisher weighs tokens of a text, and data is none"
    if recipe.calibration.drift:
        yield "calibration: drift is measured on text, and data is none"
    if recipe.target:
        yield "target: sizes and losses are measured on text, and data is none"


def target_problems(steps: Sequence[Step]) -> Iterator[str]:
    """What a recipe with a target cannot have."""
    for step in steps:
        if step.constraint.shots > 1:
            yield f"target: sparsity is chosen for one pass over the model; leave out {step.name}'s shots"
