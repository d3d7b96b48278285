"""GOBO: a handful of outliers stay in half precision, all other weights of a layer share 2^b values.

    outlier      log N(w; μ, σ) < −4          (about 0.1% of the weights)
    the rest     sorted, cut into 2^b equal-count bins, centroids = bin means; then
                 assign to the nearest centroid, recompute means, while the total L1 error falls

W: (out, in); one table per layer, no data. Stored: ``Patched(Levels)``. With a mask the table gets an exact zero and
only kept weights are fitted. Source: Zadeh, Edo, Awad, Moshovos, MICRO 2020 (arXiv 2005.03842); methods/02 §8.
Differs: outliers are kept in fp16 instead of fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Levels, Patched, Problem, Solved
from .codebook import nearest
from .common import finish, grids, half, layers, restack, start


@dataclass(frozen=True)
class GOBO:
    """``threshold`` of the log density; ``rounds`` at most."""

    threshold: float = -4.0
    rounds: int = 50


def outliers(W: Tensor, threshold: float) -> Tensor:
    """Bool, shape of W: log density below the threshold under the normal fitted to all entries."""
    deviation = W.std(correction=0).clamp_min(1e-12)
    log_density = -((W - W.mean()) / deviation).square() / 2 - torch.log(deviation) - 0.5 * math.log(2 * math.pi)
    return log_density < threshold


def centroids(w: Tensor, bits: int, rounds: int) -> tuple[Tensor, list[float]]:
    """Rising table (2^bits,) for the values ``w`` (n,), and the L1 error after each accepted round."""
    k = 2**bits
    ordered = w.sort().values
    if len(w) < k:
        last = float(ordered[-1]) if len(w) else 0.0
        return torch.cat([ordered, torch.full((k - len(w),), last)]), []
    table = torch.stack([part.mean() for part in ordered.tensor_split(k)])
    history = [float((table[nearest(table, w)] - w).abs().sum())]
    for _ in range(rounds):
        index = nearest(table, w)
        count = torch.zeros(k).index_add_(0, index, torch.ones_like(w))
        means = torch.zeros(k).index_add_(0, index, w) / count.clamp_min(1)
        trial = torch.where(count > 0, means, table).sort().values
        error = float((trial[nearest(trial, w)] - w).abs().sum())
        if error >= history[-1]:
            break
        table = trial
        history.append(error)
    return table, history


def gobo(problem: Problem, config: GOBO) -> Solved:
    """Every layer of the stack with a table of its own."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "gobo"), strict=True):
        W, mask = start(layer)
        kept = torch.ones_like(W, dtype=torch.bool) if mask is None else mask
        far = outliers(W, config.threshold) & kept
        table, _ = centroids(W[kept & ~far], grid.bits, config.rounds)
        if mask is not None:
            table[table.abs().argmin()] = 0
        table = half(table)
        values = nearest(table, W).to(torch.uint8)
        base = Levels(values, table[None], torch.ones(len(W), 1), W.shape[1], "gobo", custom=True)
        notes = {"outliers": float(far.float().mean())}
        out.append(finish(layer, stored=Patched.where(base, far, W), mask=mask, notes=notes))
    return restack(problem, out)
