"""What the solvers of this family share: where to start, which zeros to keep, how to finish, error feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core import Codes, Grid, Problem, RecipeError, Solved, Stack, Stacked, Stored


def start(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Weights to approximate, (out, in), and the keep-mask of the constraint's pattern, or None.

    After a pruning step these are that step's weights; a pattern without one keeps the largest weights.
    """
    W = problem.weight if problem.start is None else problem.start.weight
    if not problem.constraint.sparse:
        return W, None
    mask = problem.constraint.select(W.abs())
    return W * mask, mask


def grids(problem: Problem, method: str) -> list[tuple[slice, Grid]]:
    """The grid of every layer of the stack; raises when the step does not say how many bits."""
    out = [(rows, part.grid) for rows, part in problem.constraint.slices() if part.grid is not None]
    if not out:
        raise RecipeError(f"`{method}` on {', '.join(problem.names)}: the step needs `bits` (2 to 8)")
    return out


def finish(
    problem: Problem,
    codes: Codes | None = None,
    stored: Stored | None = None,
    mask: Tensor | None = None,
    notes: Mapping[str, float] | None = None,
    damping: float = 0.01,
) -> Solved:
    """The solution that decodes from ``codes`` or else ``stored``."""
    form = codes if codes is not None else stored
    assert form is not None
    weight = form.decode()
    return Solved(
        weight, codes, mask, problem.error(weight, damping), notes or {}, None if codes is not None else stored
    )


def half(t: Tensor) -> Tensor:
    """Rounded to half precision, as it will be stored."""
    return t.half().float()


def feedback(
    W: Tensor,
    U: Tensor,
    choose: Callable[[int, Tensor], Tensor],
    begin: Callable[[int, Tensor], None] | None = None,
    group: int = 128,
) -> Tensor:
    """The error-feedback sweep of :mod:`lissom.core.sweep` for choices that are no constraint of the vocabulary.

    ``choose(column, w) → q`` for the current weights (out,) of a column; ``begin(column, w)`` at each start of a group
    with the current weights (out, ≤ group) of that group. Returns Q (out, in).
    """
    W = W.clone()
    columns = W.shape[1]
    width = group * max(1, 128 // group)
    Q = torch.empty_like(W)
    for at in range(0, columns, width):
        stop = min(at + width, columns)
        w = W[:, at:stop].T.contiguous()
        errors = torch.empty_like(w)
        u = U[at:stop, at:stop]
        for i in range(stop - at):
            if begin is not None and i % group == 0:
                begin(at + i, w[i : i + group].T)
            q = choose(at + i, w[i])
            Q[:, at + i] = q
            e = (w[i] - q) / u[i, i]
            errors[i] = e
            w[i + 1 :].addr_(u[i, i + 1 :], e, alpha=-1)
        if stop < columns:
            W[:, stop:].addmm_(errors.T, U[at:stop, stop:], alpha=-1)
    return Q


def layers(problem: Problem) -> list[Problem]:
    """Every layer of the stack as a problem of its own; statistics and factorisations stay shared."""
    out = []
    for name, (rows, part) in zip(problem.names, problem.constraint.slices(), strict=True):
        begun = problem.start.part(rows, None) if problem.start is not None else None
        constraint = Stack(((rows.stop - rows.start, part),))
        out.append(
            replace(problem, weight=problem.weight[rows], constraint=constraint, names=(name,), start=begun, extras={})
        )
    return out


def restack(problem: Problem, parts: Sequence[Solved]) -> Solved:
    """Solutions of :func:`layers` as one solution of the stack; notes are averaged."""
    if len(parts) == 1:
        return parts[0]
    masks = [p.mask for p in parts if p.mask is not None]
    mask = None
    if masks:
        mask = torch.cat([torch.ones_like(p.weight, dtype=torch.bool) if p.mask is None else p.mask for p in parts])
    forms = [p.codes if p.codes is not None else p.stored for p in parts]
    stored = Stacked(tuple((len(p.weight), f) for p, f in zip(parts, forms, strict=True) if f is not None))
    notes = {k: sum(p.notes[k] for p in parts) / len(parts) for k in parts[0].notes if all(k in p.notes for p in parts)}
    weight, error = torch.cat([p.weight for p in parts]), torch.cat([p.error for p in parts])
    return Solved(weight, None, mask, error, notes, stored)


class Adam:
    """Adam without weight decay on a few tensors, in place (importing torch.optim's costs seconds)."""

    def __init__(self, parameters: Sequence[Tensor], lr: float):
        self.parameters, self.lr, self.steps = list(parameters), lr, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients, which are then cleared."""
        self.steps += 1
        a, b = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for p, (m, v) in zip(self.parameters, self.moments, strict=True):
            if p.grad is not None:
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad.square(), 0.001)
                p -= self.lr * (m / a) / ((v / b).sqrt() + 1e-8)
                p.grad = None
