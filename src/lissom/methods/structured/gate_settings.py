"""What all methods share that train gates, or project units, while the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class UnitTraining:
    """``keep_heads``, ``keep_neurons``: fractions that remain in every block.

    ``steps`` of ``batch`` windows of ``length`` tokens of ``data`` (a file or a name; empty: the calibration's), with the
    losses ``text`` (next token) and ``logits`` (KL to the dense model). ``weights``: what is trained besides: "all" linear
    layers, "lora" updates of ``rank``, or "frozen". ``gate_rate``: learning rate of gates and multipliers. The target
    sparsity rises linearly over the share ``ramp`` of the training. ``device`` ``auto``: that of the run, and on a GPU
    ``precision`` ``auto`` is bfloat16. ``target``, ``of``: a size that the result must not exceed.
    """

    keep_heads: float = 1.0
    keep_neurons: float = 0.8
    target: float | None = None
    of: Literal["parameters", "bytes", "latency"] = "parameters"
    steps: int = 400
    batch: int = 8
    length: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-4
    gate_rate: float = 0.05
    warmup: float = 0.05
    ramp: float = 0.3
    weights: Literal["all", "lora", "frozen"] = "all"
    rank: int = 8
    data: str = ""
    text: float = 1.0
    logits: float = 0.0
    held_out: int = 4
    evaluate_every: int = 50
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate, self.evaluate_every, self.held_out, self.rank) < 1:
            raise ValueError("steps, batch, accumulate, held_out, evaluate_every and rank must be at least 1")
        if self.length < 2 or not 0 <= self.warmup < 1 or not 0 <= self.ramp <= 1:
            raise ValueError("length must be at least 2, warmup in [0, 1) and ramp in [0, 1]")
        if self.learning_rate <= 0 or self.gate_rate <= 0:
            raise ValueError("learning_rate and gate_rate must be positive")
        if min(self.text, self.logits) < 0 or not self.text + self.logits:
            raise ValueError("text and logits must not be negative, and one must be positive")


def reached(progress: float, ramp: float) -> float:
    """The part of the target that holds at this ``progress``."""
    return min(progress / ramp, 1.0) if ramp else 1.0


def remaining(open_: dict[str, Tensor], size: dict[str, int]) -> Tensor:
    """Expected weights of all units with gates; a block's gate multiplies those of its units, (): CoFi's expected size."""
    total = open_["heads" if "heads" in open_ else "neurons"].new_zeros(())
    for kind in ("heads", "neurons"):
        if kind in open_:
            each = open_[kind].sum(1)
            total = total + size[kind] * (each * open_["blocks"] if "blocks" in open_ else each).sum()
    return total
