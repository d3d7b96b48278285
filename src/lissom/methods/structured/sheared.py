"""Sheared LLaMA: the model is pruned to a given shape, every dimension of it under a constraint of its own.

    max over λ, min over the rest:   loss + Σ_j λ_j (ŝ_j − t_j) + φ_j (ŝ_j − t_j)²
    j: heads of block 1, …, heads of block B, neurons of block 1, …, blocks, channels

so that every block ends with the same numbers, which is what transformers loads. With ``domains`` (texts), batches are
loaded dynamically: every ``reload_every`` steps the share of a domain grows with exp(excess of its loss over the reference).
Source: Xia, Gao, Zeng, Chen, ICLR 2024 (arXiv 2310.06694), eq. 1–3 and algorithm 1; methods/03 §30. Differs: the reference
loss of a domain is that of the dense model on it (the paper predicts it by a scaling law); the paper's continued
pre-training is the step ``heal``. Costs ``steps`` training steps of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import GateProblem
from .gate_settings import UnitTraining, reached


@dataclass(frozen=True)
class Sheared(UnitTraining):
    """``keep_blocks``, ``keep_channels``: the rest of the shape. ``domains``: texts instead of ``data``, equally shared at first."""

    keep_heads: float = 0.5
    keep_neurons: float = 0.75
    keep_blocks: float = 1.0
    keep_channels: float = 1.0
    domains: tuple[str, ...] = ()
    reload_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reload_every < 1 or (self.domains and self.data):
            raise ValueError("reload_every must be at least 1; give domains or data, not both")


def sheared(problem: GateProblem, config: Sheared) -> Tensor:
    """ŝ_j − t_j of every dimension, (n,)."""
    now = reached(problem.progress, config.ramp)
    gaps = []
    for kind in sorted(problem.open):
        opened = problem.open[kind]
        share = opened.mean(1) if opened.dim() == 2 else opened.mean()[None]
        gaps.append((1 - share) - now * (1 - problem.keep[kind]))
    return torch.cat(gaps)
