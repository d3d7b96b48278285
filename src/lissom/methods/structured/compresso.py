"""Compresso: the base frozen, low-rank updates and gates trained together, and the model told that it is being pruned.

    max over λ, min over B, A, log α:   loss(prompt ⊕ text; z ∘ (W + B A)) + λ₁ (ŝ − t) + λ₂ (ŝ − t)²

with hard-concrete gates z on heads, neurons and channels; ``prompt`` stands before every window of the training, and its own
tokens are not learned. It belongs before texts at run time too; the manifest keeps it. Source: Guo, Xu, Zhang, Yang 2023
(arXiv 2310.05015), §3; methods/03 §31. Differs: any text instead of instructions by GPT-4, a prompt of our own words, and one
number of heads and neurons for all blocks. Memory of the optimiser: the low-rank updates only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import GateProblem
from .gate_settings import UnitTraining, reached, remaining

PROMPT = (
    "Some of this language model's parts are being removed while it reads. It makes up for what is missing, and goes on "
    "to answer and to write as well as before.\n"
)


@dataclass(frozen=True)
class Compresso(UnitTraining):
    """``keep_channels``: of the hidden state. ``prompt``: empty for none. See :class:`UnitTraining`."""

    keep_heads: float = 0.8
    keep_channels: float = 1.0
    weights: Literal["all", "lora", "frozen"] = "lora"
    learning_rate: float = 5e-4
    prompt: str = PROMPT


def compresso(problem: GateProblem, config: Compresso) -> Tensor:
    """Gaps (1,) of heads and neurons together, or (2,) with that of the channels."""
    now = reached(problem.progress, config.ramp)
    units = {k: o for k, o in problem.open.items() if k != "channels"}
    size = dict(problem.size)
    gaps = []
    if units:
        full = sum(size[k] * o.numel() for k, o in units.items())
        wanted = sum(size[k] * o.numel() * problem.keep[k] for k, o in units.items())
        gaps.append(1 - remaining(units, size) / full - now * (1 - wanted / full))
    if "channels" in problem.open:
        gaps.append(1 - problem.open["channels"].mean() - now * (1 - problem.keep["channels"]))
    return torch.stack(gaps)
