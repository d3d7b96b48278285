"""Channel permutation for N:M patterns: deal the inputs so that every group of M mixes strong and weak ones.

    zig-zag   sort the columns by Σ_r score; deal them out to the G = in/M groups, forwards, backwards, forwards, …
    assign    for each position in turn, reassign the columns that sit there to the groups so that the retained score
              Σ_r (sum of the N largest scores of each group) is largest: a linear sum assignment
    swap      within blocks of neighbouring channels, exchange pairs of columns as long as the retained score grows

A permutation of inputs leaves the layer's function unchanged when the producer's outputs (or the activations) are permuted
alike. ``order[j]`` is the column that moves to place j: ``W[:, order]`` with ``x[order]``.
Sources: RIA (zig-zag, assignment; Zhang et al., ICLR 2024), E-Sparse (global and local shuffle; arXiv 2310.15929); methods/03
§6–7. Differs: the assignment scores a column in a group by the retained score of that group with it, exactly, and a step is
kept only when the total grows, so no step ever lowers it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import HOST


def retained(score: Tensor, n: int, m: int) -> float:
    """Sum of the scores that N:M keeps; ``score: (out, in)``."""
    return float(score.reshape(len(score), -1, m).topk(n, 2).values.sum(dtype=torch.double))


def zigzag(score: Tensor, m: int) -> Tensor:
    """The order (in,) that deals columns, best first, to groups forwards and backwards in turn."""
    groups = _groups(score, m)
    ranked = score.sum(0).argsort(descending=True, stable=True).reshape(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.reshape(-1)


def assign(score: Tensor, n: int, m: int, order: Tensor | None = None, rounds: int = 1) -> Tensor:
    """Improve ``order`` (default zig-zag) by one linear sum assignment per position of the groups and round.

    O(rounds · m · (out·in·groups + groups³)) work.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    groups = _groups(score, m)
    order = zigzag(score, m) if order is None else order.clone()
    best = retained(score[:, order], n, m)
    for _ in range(rounds):
        for position in range(m):
            places = order.reshape(groups, m)
            others = score[:, torch.cat([places[:, :position], places[:, position + 1 :]], 1)]  # (out, groups, m−1)
            candidates = score[:, places[:, position]]  # (out, groups)
            top = others.topk(n, 2).values if n < m else others
            # a column enters the kept N of a group by displacing the N-th of the others
            floor = top[:, :, n - 1] if n < m else torch.zeros_like(candidates)
            base = top[:, :, : n - 1].sum(2) if n < m else top.sum(2)
            gain = torch.stack([(torch.maximum(candidates, floor[:, g, None])).sum(0) for g in range(groups)])
            _, chosen = linear_sum_assignment((gain + base.sum(0)[:, None]).double().cpu().numpy(), maximize=True)
            trial = places.clone()
            trial[:, position] = places[torch.from_numpy(chosen), position]
            total = retained(score[:, trial.reshape(-1)], n, m)
            if total > best:
                order, best = trial.reshape(-1), total
    return order


def swap(score: Tensor, n: int, m: int, order: Tensor | None = None, block: int = 256, seed: int = 0) -> Tensor:
    """E-Sparse's local shuffle: random pairs within blocks of ``block`` columns are exchanged when that retains more.

    As many trials as the block has columns, times M; every trial looks at two groups only.
    """
    columns = score.shape[1]
    _groups(score, m)
    order = torch.arange(columns) if order is None else order.clone()
    generator = torch.Generator().manual_seed(seed)
    block = max(m, block // m * m)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        for i, j in torch.randint(start, stop, (m * (stop - start), 2), generator=generator, device=HOST).tolist():
            a, b = i // m * m, j // m * m
            if a == b:
                continue
            places = torch.cat([torch.arange(a, a + m), torch.arange(b, b + m)])
            trial = order[places].clone()
            trial[i - a], trial[m + j - b] = order[j], order[i]
            if retained(score[:, trial], n, m) > retained(score[:, order[places]], n, m):
                order[places] = trial
    return order


def _groups(score: Tensor, m: int) -> int:
    if score.shape[1] % m:
        raise ValueError(f"groups of {m} do not divide {score.shape[1]} columns")
    return score.shape[1] // m
