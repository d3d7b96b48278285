"""Steps of kind ``permutation``: the dense model with its free channels in a better order, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core import RecipeError, Stats
from ..export.layout import parse_pattern
from ..models import Block, Linear, Model
from ..models.permute import free_channels, permuted
from .recipe import Recipe, Step
from .stream import histogram_bins, stream_block


def pattern_of(model: Model, step: Step, recipe: Recipe) -> tuple[int, int]:
    """(N, M) of the step; raises :class:`RecipeError` where it is none or its groups do not fit the model's channels."""
    nm = _of_pruning(recipe) if step.config.pattern == "auto" else parse_pattern(step.config.pattern)
    if nm is None:
        raise RecipeError(
            f"{step.name}: pattern must be N:M such as 2:4, or auto before a step that prunes N:M, not {step.config.pattern!r}"
        )
    for units, segments in free_channels(model.architecture, model.config, model.linears(0)):
        if units.count // segments % nm[1]:
            raise RecipeError(
                f"{step.name}: groups of {nm[1]} do not divide the {units.count // segments} {units.kind} that may be permuted"
            )
    return nm


def _of_pruning(recipe: Recipe) -> tuple[int, int] | None:
    """The first N:M that the recipe prunes to; of a free N the one that its sparsity means on average."""
    for step in recipe.steps:
        c = step.constraint
        if c.prunes and c.group:
            return c.nm or (max(1, round((1 - c.target) * c.group)), c.group)
    return None


def permute_block(
    model: Model, block: Block, step: Step, nm: tuple[int, int], hidden: list[Tensor], watch: int | None = None
) -> tuple[list[Tensor], dict[str, list[float]]]:
    """Permute the weights of ``block`` in place; its outputs, and the share of the score retained before and after by kind."""
    found: dict[str, list[float]] = {}
    chosen = []

    def visit(stage: tuple[Linear, ...], stats: Stats) -> None:
        for units, segments in free_channels(block.row, block.config, block.linears):
            for name, columns in units.columns.items():
                if name == stage[0].name:
                    order, *shares = step.method.run(block.weight(name), stats, columns, segments, *nm, step.config)
                    chosen.append((units, order))
                    found[units.kind] = shares

    after = stream_block(block, hidden, visit, gram=False, watch=watch, bins=histogram_bins([step]))
    for units, order in chosen:
        block.parameters = permuted(block.parameters, units, order)
    return after, found


def permute_blocks(
    model: Model,
    step: Step,
    nm: tuple[int, int],
    hidden: list[Tensor],
    write: Callable[[int, Block], None],
    tick: Callable[[str, int, int], None] | None = None,
    watch: int | None = None,
) -> dict[str, Any]:
    """All blocks in turn, each handed to ``write``; the record for the manifest."""
    retained = {}
    for i in range(model.blocks):
        block = model.load_block(i)
        hidden, retained[str(i)] = permute_block(model, block, step, nm, hidden, watch)
        write(i, block)
        if tick:
            tick(step.name, i + 1, model.blocks)
    return {"pattern": f"{nm[0]}:{nm[1]}", "retained": retained}
