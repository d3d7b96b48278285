"""Small layer problems with correlated inputs, one of them loud."""

from __future__ import annotations

import torch
from torch import Tensor

from lissom.core import Both, Constraint, Fixed, Grid, Problem, Stack, Stats


def inputs(columns: int, tokens: int = 300, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    X[:, 1] *= 8
    return X


def problem(
    rows: int = 12, columns: int = 32, constraint: Constraint | None = None, mask: Tensor | None = None, seed: int = 0
) -> Problem:
    """One layer; ``mask`` prunes it beforehand."""
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) * 0.1
    grid = constraint if isinstance(constraint, Grid) else Grid(3, 16)
    pattern = None if mask is None else Fixed(mask)
    W = W if mask is None else W * mask
    return Problem.of(W, Stats.of(inputs(columns, seed=seed)), Both(pattern, grid))


def stack(constraint: Both, rows: tuple[int, ...] = (4, 8), columns: int = 32) -> Problem:
    single = problem(sum(rows), columns)
    names = tuple(f"layer{i}" for i in range(len(rows)))
    return Problem(single.weight, single.stats, Stack(tuple((n, constraint) for n in rows)), names)
