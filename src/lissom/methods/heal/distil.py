"""Healing by distillation: the whole compressed model trained against the dense one, on its masks and grids.

    minimise over θ   a · next token  +  b · T² KL(dense ‖ student)  +  c · hidden states  +  d · attention  +  e · relations

Sparse weights stay on their mask, quantized ones on their grid with fixed scales, trained straight-through; so the
artefact keeps its format and its size. ``rank`` > 0 trains a low-rank update (LoRA) instead of every kept weight: less
memory for the optimiser, weaker. Norms and biases are trained along (``norms``).
Source: Hinton et al. 2015 (arXiv 1503.02531); after pruning: arXiv 2310.06694 §3; straight-through: arXiv 1308.3432.
Costs about 4 forward passes of the whole model a token, and memory for 2 models, 2 moments and the best weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .losses import Distance, Divergence
from .objective import Objective, Outputs, compare


@dataclass(frozen=True)
class Heal:
    """``steps`` of ``batch`` windows of ``length`` tokens, or ``minutes`` if they end first. ``data``: text to train on, a file
    or a name; empty: that of the calibration. ``held_out`` windows of its end are kept apart and choose the best state;
    after ``patience`` judgements without a better one the training ends. ``ema``: decay of an average of the weights, which
    is then what is judged and kept. ``recompute``: inner activations are made again for the backward pass, not kept.
    ``cache`` > 0: the teacher's so many largest log-probabilities are written to disk first, and the teacher let go.
    ``hidden``, ``attention``, ``relations``: weights of matching hidden states (of ``layers``), attention maps and query, key
    and value relations. ``rewind``: the learning rate starts where its schedule is at this share, as in a training that is
    run again from there. ``gradual``: the share of zeros to which the masks grow meanwhile, by magnitude along a cubic, in
    ``updates`` until the share ``rise`` of the training (layers with an N:M pattern keep theirs). ``tensorboard``: a folder for curves.
    ``device`` ``auto``: that of the run, and on a GPU then ``precision`` ``auto`` is bfloat16 (autocast; the weights stay
    fp32). ``teacher``: a checkpoint to learn from; empty: the model before compression."""

    steps: int = 500
    minutes: float | None = None
    batch: int = 8
    length: int = 256
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    data: str = ""
    held_out: int = 8
    evaluate_every: int = 50
    text: float = 0.0
    logits: float = 1.0
    kind: Divergence = "forward"
    temperature: float = 1.0
    hidden: float = 0.0
    distance: Distance = "normalised"
    layers: Literal["uniform", "last"] = "uniform"
    attention: float = 0.0
    relations: float = 0.0
    rewind: float = 0.0
    gradual: float | None = None
    updates: int = 20
    rise: float = 0.6
    ema: float | None = None
    patience: int | None = None
    recompute: bool = False
    cache: int = 0
    tensorboard: str = ""
    teacher: str = ""
    rank: int = 0
    norms: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate, self.evaluate_every, self.held_out) < 1 or self.length < 2:
            raise ValueError(
                "steps, batch, accumulate, held_out and evaluate_every must be at least 1, length at least 2"
            )
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or self.rank < 0:
            raise ValueError("learning_rate must be positive, warmup in [0, 1), rank at least 0")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be positive, not {self.minutes}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self.patience}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, not {self.ema}")
        if self.gradual is not None and (
            not 0 < self.gradual < 1 or self.rank or self.updates < 1 or not 0 < self.rise <= 1
        ):
            raise ValueError("gradual must be between 0 and 1 and needs rank 0, updates ≥ 1 and rise in (0, 1]")
        if self.gradual is not None and (self.patience is not None or self.ema is not None):
            raise ValueError("gradual ends at its sparsity, with the last weights: set neither patience nor ema")
        if not 0 <= self.rewind < 1:
            raise ValueError(f"rewind must be at least 0 and below 1, not {self.rewind}")
        inner = self.hidden or self.attention or self.relations
        plain = self.logits > 0 and self.kind == "forward" and self.temperature == 1 and not inner
        if self.cache < 0 or (self.cache and (not plain or self.minutes is not None)):
            raise ValueError(
                "cache holds the largest log-probabilities of a known number of steps: it must not be negative, and needs "
                "logits > 0, kind forward, temperature 1, hidden, attention and relations 0, and no minutes"
            )
        self.objective()

    def objective(self) -> Objective:
        return Objective(
            text=self.text, logits=self.logits, kind=self.kind, temperature=self.temperature, hidden=self.hidden,
            distance=self.distance, layers=self.layers, attention=self.attention, relations=self.relations,
        )  # fmt: skip


def heal(ours: Outputs, theirs: Outputs | None, ids: Tensor, config: Heal) -> Tensor:
    """The loss of one batch of ``ids`` (sequences, tokens)."""
    return compare(ours, theirs, ids, config.objective())
