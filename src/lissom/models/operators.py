"""Operators that a run of the model needs beside its weights: rounded activations, a rounded cache, rotations.

They are part of an artefact (``lissom_operators`` of config.json) and of every forward pass of a :class:`~.forward.Block`:

    input of a stage      x ← x R  (``turn_inputs``),  then x ← codes · scale  (``activations``)
    attention             q, k ← q R, k R after positions (``turn_heads``),  then k, v as a cache gives them back (``cache``)

The cache is simulated as decoding would use it: token by token, so that no key's grid depends on a later token than the
query's. Gradients pass straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core import FormatError, Rotation, moved
from ..methods.quantize.activations import round_input
from ..methods.quantize.kv_cache import CacheGrid, fake_cache, fake_cache_static, in_full_precision

KEY = "lissom_operators"  # in config.json


@dataclass(frozen=True)
class InputGrid:
    """Symmetric codes of ``bits`` for the inputs of some ``stages``; scales of each token, or static ones.

    ``scales``: "block.stage" → the static scale; empty when the grid is dynamic.
    """

    bits: int
    stages: tuple[int, ...]
    static: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)


Constants = tuple[
    tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]
]  # scales and zero points, (heads, size) each


@dataclass(frozen=True)
class Operators:
    """Of a whole model. ``turn_inputs``: stage → rotation of that stage's inputs. ``cache_grids``: block → the grids of its
    keys and of its values, where the cache's are static."""

    activations: InputGrid | None = None
    cache: tuple[CacheGrid, CacheGrid] | None = None
    turn_inputs: Mapping[int, Rotation] = field(default_factory=dict)
    turn_heads: Rotation | None = None
    cache_grids: Mapping[int, tuple[Constants, Constants]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.activations or self.cache or self.turn_inputs or self.turn_heads)

    @property
    def turns(self) -> bool:
        """Whether the weights alone, without operators, are another function: an engine must know the rotations."""
        return bool(self.turn_inputs)

    def describe(self) -> dict[str, Any]:
        """Plain JSON; :func:`read_operators` is the inverse."""
        out: dict[str, Any] = {}
        if self.activations:
            out["activations"] = asdict(self.activations) | {"stages": list(self.activations.stages)}
        if self.cache:
            out["cache"] = {k: asdict(g) for k, g in zip(("keys", "values"), self.cache, strict=True)}
        if self.cache_grids:
            out["cache_grids"] = {
                str(i): [[[list(row) for row in t] for t in constants] for constants in both]
                for i, both in self.cache_grids.items()
            }
        if self.turn_inputs:
            out["turn_inputs"] = {str(s): asdict(r) for s, r in self.turn_inputs.items()}
        if self.turn_heads:
            out["turn_heads"] = asdict(self.turn_heads)
        return out

    def merged(self, other: Operators) -> Operators:
        """Both; where both say something, ``other`` holds."""
        return Operators(
            other.activations or self.activations,
            other.cache or self.cache,
            {**self.turn_inputs, **other.turn_inputs},
            other.turn_heads or self.turn_heads,
            other.cache_grids if other.cache else self.cache_grids,
        )


def read_operators(data: Any, where: str = "config.json") -> Operators:
    """The operators of ``lissom_operators``; raises :class:`FormatError` for anything that is not understood."""
    if not data:
        return Operators()
    try:
        known = {"activations", "cache", "cache_grids", "turn_inputs", "turn_heads"}
        if set(data) - known:
            raise ValueError(f"unknown operators {', '.join(sorted(set(data) - known))}")
        grid = data.get("activations")
        activations = InputGrid(**{**grid, "stages": tuple(grid["stages"])}) if grid else None
        cache = data.get("cache")
        grids = (CacheGrid(**cache["keys"]), CacheGrid(**cache["values"])) if cache else None
        turns = {int(s): Rotation(**r) for s, r in data.get("turn_inputs", {}).items()}
        heads = Rotation(**data["turn_heads"]) if data.get("turn_heads") else None
        constants: dict[int, Any] = {
            int(i): tuple(tuple(tuple(tuple(map(float, row)) for row in t) for t in one) for one in both)
            for i, both in data.get("cache_grids", {}).items()
        }
        return Operators(activations, grids, turns, heads, constants)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(
            f"{where}: {KEY} is not understood ({error}); install the lissom that wrote it, or a newer one"
        ) from error


class BlockOperators:
    """The operators of one block. ``scales`` may be filled while a static grid is calibrated; ``observe`` is given keys and
    values whose static grids are not known yet, and which therefore stay as they are."""

    def __init__(self, operators: Operators, number: int):
        self.operators, self.number = operators, number
        self.scales: dict[int, float] = {}
        self.observe: Callable[[Tensor, Tensor], None] | None = None
        known = operators.cache_grids.get(number)
        self.grids = [tuple(torch.tensor(t)[:, None] for t in one) for one in known] if known else None
        if operators.activations:
            for stage in operators.activations.stages:
                key = f"{number}.{stage}"
                if key in operators.activations.scales:
                    self.scales[stage] = operators.activations.scales[key]

    def waits(self, stage: int) -> bool:
        """Whether the stage's inputs get a static scale that is not known yet."""
        grid = self.operators.activations
        return grid is not None and grid.static and stage in grid.stages and stage not in self.scales

    def turned(self, stage: int, x: Tensor) -> Tensor:
        turn = self.operators.turn_inputs.get(stage)
        return x if turn is None else turn.apply(x)

    def rounded(self, stage: int, x: Tensor) -> Tensor:
        """``x`` on the stage's grid; unchanged where there is none, or its scale is still to be found."""
        grid = self.operators.activations
        if grid is None or stage not in grid.stages or self.waits(stage):
            return x
        return straight(x, round_input(x.detach(), grid.bits, self.scales.get(stage)))

    def incoming(self, stage: int, x: Tensor) -> Tensor:
        """What the linear layers of ``stage`` are applied to, for their input ``x: (batch, tokens, in)``."""
        return self.rounded(stage, self.turned(stage, x))

    def heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        turn = self.operators.turn_heads
        return (q, k) if turn is None else (turn.apply(q), turn.apply(k))

    def cached(self, k: Tensor, v: Tensor) -> list[Cached] | None:
        """Keys and values as attention reads them, or None where nothing rounds them."""
        both = self.operators.cache
        if both is None:
            return None
        if any(grid.static for grid in both) and self.grids is None:
            if self.observe is None:
                raise FormatError(f"block {self.number}: the static grids of its cache are missing in {KEY}")
            self.observe(k, v)
            return None
        constants = moved(self.grids, k.device) if self.grids else (None, None)
        return [Cached.of(t, grid, found) for t, grid, found in zip((k, v), both, constants, strict=True)]


@dataclass(frozen=True)
class Cached:
    """Keys or values as attention reads them: ``old`` from the cache, ``new`` where ``fresh`` (tokens, tokens) is true."""

    old: Tensor
    new: Tensor
    fresh: Tensor | None

    @classmethod
    def of(cls, x: Tensor, grid: CacheGrid, constants: tuple[Tensor, ...] | None = None) -> Cached:
        """``x: (batch, heads, tokens, size)``; ``constants``: scale and zero point of a static grid, (heads, 1, size)."""
        if constants is None:
            rounded = fake_cache(x.detach(), replace(grid, recent=0))
        else:
            rounded = fake_cache_static(x.detach(), constants[0], constants[1], grid.bits)
        stored = straight(x, rounded)
        return cls(stored, x, in_full_precision(x.shape[2], grid))

    def repeated(self, times: int) -> Cached:
        return replace(self, old=self.old.repeat_interleave(times, 1), new=self.new.repeat_interleave(times, 1))

    def scores(self, q: Tensor) -> Tensor:
        """``q kᵀ``, (batch, heads, tokens, tokens)."""
        scores = q @ self.old.transpose(-1, -2)
        return scores if self.fresh is None else torch.where(self.fresh, q @ self.new.transpose(-1, -2), scores)

    def weighted(self, p: Tensor) -> Tensor:
        """``p v`` for probabilities ``p: (batch, heads, tokens, tokens)``."""
        if self.fresh is None:
            return p @ self.old
        return (p * ~self.fresh) @ self.old + (p * self.fresh) @ self.new


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``x``."""
    return x + (rounded - x).detach() if x.requires_grad else rounded
