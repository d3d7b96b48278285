"""Solved layers for tests, without calibration."""

import torch

from lissom.core import NM, Both, Grid, Problem, Solved, Sparse, Stats


def solve(weight: torch.Tensor, pattern: Sparse | NM | None = None, grid: Grid | None = None) -> Solved:
    problem = Problem.of(weight, Stats.of(torch.ones(1, weight.shape[1])), Both(pattern, grid))
    return problem.project(weight.abs())


def pattern_name(pattern: Sparse | NM | None) -> str:
    return "dense" if pattern is None else "unstructured" if isinstance(pattern, Sparse) else f"{pattern.n}:{pattern.m}"
