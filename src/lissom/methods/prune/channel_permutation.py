"""Channel permutation: reorder the inputs of a layer so that N:M keeps more, and whatever makes them alike.

    order ← zig-zag, assignment or swaps (:mod:`.permute`) on the score of the weights, over all rows that read a channel

A channel that several columns read (a value channel, by every query head of its group) adds their scores up row by row. An order
is taken only where it retains more than the present one. The pipeline folds it into the weights on both sides, so the dense
model computes the same function and stays an ordinary checkpoint; it does this where that is exact:
MLP neurons, and value channels within a head.
Source: RIA (Zhang et al., ICLR 2024) and E-Sparse (arXiv 2310.15929); methods/03 §6–7. Differs: the inputs of q, k, v, gate and up
are channels of the residual stream, one order for the whole model; they keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Stats
from .e_sparse import ESparse, channel_weight
from .permute import assign, retained, swap, zigzag
from .ria import ria_score


@dataclass(frozen=True)
class ChannelPermutation:
    """``pattern``: an N:M, or ``auto``, that of the first step that prunes; where its N is free (``n:16``), the N of its sparsity.
    ``search``: ``zigzag``, ``assign`` (RIA) or ``swap`` (E-Sparse: zig-zag, then
    swaps within ``block`` channels, with ``seed``). ``rounds`` of assignment. ``score`` that is to be retained: ``ria`` with ``power`` of
    the input norm, or ``e-sparse`` with ``alpha`` and ``bins``.
    """

    pattern: str = "auto"
    search: Literal["zigzag", "assign", "swap"] = "assign"
    rounds: int = 1
    block: int = 256
    score: Literal["ria", "e-sparse"] = "ria"
    power: float = 0.5
    alpha: float = 1.0
    bins: int = 100
    seed: int = 0


def channel_permutation(
    weight: Tensor, stats: Stats, columns: Tensor, segments: int, n: int, m: int, config: ChannelPermutation
) -> tuple[Tensor, float, float]:
    """Order (channels,), and the share of the score that N:M retains before and after.

    ``weight: (out, in)`` reads the channels, ``stats`` of its inputs; ``columns: (channels, k)``: which inputs belong to
    each channel. The channels are ``segments`` equal runs, and none leaves its own.
    """
    if config.score == "ria":
        score = ria_score(weight, stats.norm, config.power)
    else:
        score = weight.abs() * channel_weight(stats, ESparse(config.alpha, config.bins))
    score = score[:, columns].permute(0, 2, 1).flatten(0, 1)  # (out·k, channels)
    orders, before, after = [], 0.0, 0.0
    for number, part in enumerate(score.chunk(segments, 1)):
        if config.search == "assign":
            order = assign(part, n, m, rounds=config.rounds)
        else:
            order = zigzag(part, m)
            order = swap(part, n, m, order, config.block, config.seed) if config.search == "swap" else order
        old, new = retained(part, n, m), retained(part[:, order], n, m)
        if new <= old:
            order, new = torch.arange(part.shape[1]), old
        orders.append(order + number * part.shape[1])
        before, after = before + old, after + new
    total = max(float(score.sum(dtype=torch.double)), 1e-30)
    return torch.cat(orders), before / total, after / total
