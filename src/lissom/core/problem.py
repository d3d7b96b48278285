"""One layer-wise problem, its solution, and the small records from which allocations are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .columns import ColumnLoop, decide_columns
from .constraint import Stack
from .errors import RecipeError
from .factor import Factor, damped, factorise
from .grid import Codes
from .stats import Stats
from .stored import Stored
from .two_sided import EntryLoop, decide_entries


@dataclass(frozen=True)
class Solved:
    """Weights that satisfy their constraint.

    ``weight``: (out, in) fp32. ``codes``: what is stored when there is a grid; ``codes.decode()`` equals
    ``weight`` bit for bit. ``mask``: (out, in) bool of the pattern, None when dense. ``error``: (out,)
    ``½ δ H δᵀ`` of each row with the damped H. ``notes``: numbers for the report. ``stored``: what is
    stored instead of ``codes`` when the result is no uniform integer grid; decodes to ``weight`` likewise.
    """

    weight: Tensor
    codes: Codes | None
    mask: Tensor | None
    error: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)
    stored: Stored | None = None

    def part(self, rows: slice, bits: int | None) -> Solved:
        """The solution of one layer of a stack."""
        codes = None
        if self.codes is not None and bits is not None:
            codes = replace(self.codes.rows(rows.start, rows.stop), bits=bits)
        mask = None if self.mask is None else self.mask[rows]
        stored = None if self.stored is None else self.stored.rows(rows.start, rows.stop)
        return Solved(self.weight[rows], codes, mask, self.error[rows], self.notes, stored)


@dataclass(frozen=True)
class Problem:
    """Layers that share their input, stacked by rows.

    ``weight``: (out, in) fp32, the dense weights. ``stats``: of the inputs, as they are after the
    compression of everything before. ``constraint``: per layer of the stack. ``start``: the solution of
    the step before in the recipe (its mask and weights), or None. ``names``: one per layer of the stack.
    ``extras``: what few methods need besides, stacked by rows like the weights: ``gradient`` (out, in), the norm over
    samples of each weight's gradient of the loss; ``fisher`` (out, in), its mean square; ``samples`` (count, out, in),
    the gradients themselves; ``output_gram`` (out, out), E[g gᵀ] of the gradients g at the outputs; ``output_blocks`` (out, block),
    the same within blocks of so many outputs of a layer;
    ``gradient_l1`` (out, in), the sum over samples of the gradient's magnitudes; ``sample`` (tokens, in) of the inputs; ``owner``
    (in,), inputs whose factors must be equal have equal numbers.
    ``loop``: the innermost loop of :func:`.sweep`; ``entry_loop``: of :func:`.two_sided`.
    """

    weight: Tensor
    stats: Stats
    constraint: Stack
    names: tuple[str, ...] = ("layer",)
    start: Solved | None = None
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict, repr=False, compare=False)
    extras: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    loop: ColumnLoop = field(default=decide_columns, repr=False, compare=False)
    entry_loop: EntryLoop = field(default=decide_entries, repr=False, compare=False)

    @classmethod
    def of(cls, weight: Tensor, stats: Stats, constraint: object = None, **rest: object) -> Problem:
        """A problem of a single layer from a plain constraint (``Sparse``, ``NM``, ``Grid``, ``Both``)."""
        return cls(weight, stats, Stack.of(constraint, weight.shape[0]), **rest)  # type: ignore[arg-type]

    def extra(self, key: str, method: str) -> Tensor:
        """One of :attr:`extras`; raises :class:`RecipeError` when the pipeline did not gather it."""
        if key not in self.extras:
            raise RecipeError(
                f"`{method}` on {', '.join(self.names)} needs `{key}`, which was not gathered in this run; "
                "run it on a model whose gradients fit in memory, or choose a method that needs none"
            )
        return self.extras[key]

    def factor(self, damping: float = 0.01, by_activation: bool = False) -> Factor:
        """The shared factorisation (made once per damping and order).

        ``by_activation``: columns by falling diagonal of H, GPTQ's ``act_order``.
        """
        key = (damping, by_activation)
        if key not in self._factors:
            order = self.stats.sumsq.argsort(descending=True, stable=True) if by_activation else None
            self._factors[key] = factorise(self.stats.hessian, damping, order)
        return self._factors[key]

    def error(self, weight: Tensor, damping: float = 0.01) -> Tensor:
        """``½ δ H δᵀ`` of each row, (out,), with the damped H."""
        delta = weight - self.weight
        if self.stats.gram is None:  # only the diagonal is known
            return (delta.square() @ (self.stats.sumsq / max(self.stats.count, 1))).clamp_min(0)
        H, _ = damped(self.stats.hessian, damping)
        return 0.5 * ((delta @ H) * delta).sum(1).clamp_min(0)

    def energy(self) -> Tensor:
        """``½ w H wᵀ`` of each row, (out,): half the mean squared output; the scale of relative errors."""
        W = self.weight
        if self.stats.gram is None:
            return W.square() @ (self.stats.sumsq / max(self.stats.count, 1))
        return ((W @ self.stats.gram) * W).sum(1).clamp_min(0) / max(self.stats.count, 1)

    def project(self, score: Tensor, weight: Tensor | None = None, notes: Mapping[str, float] | None = None) -> Solved:
        """The solution without error feedback: keep the best scores, then round to nearest."""
        W = self.weight if weight is None else weight
        mask = self.constraint.select(score) if self.constraint.sparse else None
        if mask is not None:
            W = torch.where(mask, W, 0.0)
        codes = None
        if self.constraint.quantized:
            params = self.constraint.fit_all(W)
            codes = Codes.round(W, params, params.bits, self.constraint.group_size)
            W = codes.decode()
        return Solved(W, codes, mask, self.error(W), notes or {})

    def then(self, solved: Solved) -> Problem:
        """The problem for the next step: start from ``solved`` and keep its zeros."""
        constraint = self.constraint if solved.mask is None else self.constraint.freeze(solved.mask)
        return replace(self, start=solved, constraint=constraint)

    def split(self, solved: Solved) -> dict[str, Solved]:
        """The solution of every layer of the stack."""
        return {
            name: solved.part(rows, part.grid.bits if part.grid else None)
            for name, (rows, part) in zip(self.names, self.constraint.slices(), strict=True)
        }


@dataclass(frozen=True)
class LayerSummary:
    """What an allocation knows of a linear layer after the dense pass: a few numbers, no tensors."""

    name: str
    block: int
    role: str
    rows: int
    columns: int
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Budget:
    """What each layer may spend: ``values[name]`` of ``quantity`` ("sparsity" or "bits").

    ``bits``: of the layers whose bits are chosen beside their sparsity. ``notes``: how it was found, for the report (plain data).
    """

    quantity: str
    values: Mapping[str, float]
    cluster: Mapping[str, int] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)

    def mean(self, layers: list[LayerSummary]) -> float:
        """Mean over weights, not over layers."""
        total = sum(layer.size for layer in layers)
        return sum(layer.size * self.values[layer.name] for layer in layers) / total
