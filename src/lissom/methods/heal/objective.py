"""What a student is trained on: a weighted sum of losses against text and against a teacher's outputs.

    L = a · next token  +  b · T² D(teacher ‖ student)  +  c · hidden states  +  d · attention  +  e · relations

Hinton's distillation is a, b with D forward KL; the other terms are those of :mod:`.losses`, each with its source there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import losses


class Outputs(Protocol):
    """What a forward gives: ``logits`` (batch, tokens, vocabulary), ``hidden`` (batch, tokens, width) and ``qkv``
    (batch, heads, tokens, head_dim) of each block."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def hidden(self) -> list[Tensor]: ...
    @property
    def qkv(self) -> list[tuple[Tensor, Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Objective:
    """Weights of the terms: ``text`` next-token loss, ``logits`` divergence of ``kind`` at ``temperature``, ``hidden``
    ``distance`` of hidden states, ``attention`` KL of attention maps of the last block, ``relations`` KL of its query, key
    and value relations. ``layers``: which of the teacher's the student's hidden states are compared with: spread evenly
    (``uniform``), or its ``last`` ones."""

    text: float = 0.0
    logits: float = 1.0
    kind: losses.Divergence = "forward"
    temperature: float = 1.0
    hidden: float = 0.0
    distance: losses.Distance = "normalised"
    attention: float = 0.0
    relations: float = 0.0
    layers: Literal["uniform", "last"] = "uniform"

    def __post_init__(self) -> None:
        weights = (self.text, self.logits, self.hidden, self.attention, self.relations)
        if min(weights) < 0 or not any(weights):
            raise ValueError("the weights of the losses must not be negative, and one must be positive")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def needs_teacher(self) -> bool:
        return any((self.logits, self.hidden, self.attention, self.relations))


def compare(ours: Outputs, theirs: Outputs | None, ids: Tensor, config: Objective) -> Tensor:
    """The loss of one batch; ``theirs`` may be None where no term needs it."""
    total = ours.logits.new_zeros(())
    if config.text:
        total = total + config.text * losses.next_token(ours.logits, ids)
    if theirs is None:
        return total
    if config.logits:
        value = losses.divergence(ours.logits, theirs.logits, config.kind, config.temperature)
        total = total + config.logits * value
    if config.hidden:
        spread = {"uniform": losses.uniform_map, "last": losses.last_map}[config.layers]
        layers = spread(len(ours.hidden), len(theirs.hidden))
        total = total + config.hidden * losses.hidden(ours.hidden, theirs.hidden, layers, config.distance)
    if config.attention:
        total = total + config.attention * losses.attention(attention_map(ours), attention_map(theirs))
    if config.relations:
        heads = math.gcd(ours.qkv[-1][1].shape[1], theirs.qkv[-1][1].shape[1])
        terms = [losses.relations(a, b, heads) for a, b in zip(ours.qkv[-1], theirs.qkv[-1], strict=True)]
        total = total + config.relations * torch.stack(terms).mean()
    return total


def attention_map(output: Outputs) -> Tensor:
    """Causal attention of the last block by content alone (no positions), mean over heads: (batch, 1, tokens, tokens)."""
    q, k, _ = output.qkv[-1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1).mean(1, keepdim=True)
