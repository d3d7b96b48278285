"""What a student is trained on: a weighted sum of losses against text and a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import CalibrationError
from ..methods.heal import losses
from .batches import Batches
from .student import Network, Output


@dataclass(frozen=True)
class Objective:
    """Weights of the terms: ``text`` next-token loss, ``logits`` divergence of ``kind`` at ``temperature``, ``hidden``
    ``distance`` of hidden states, ``attention`` KL of attention maps of the last block, ``relations`` KL of its query, key
    and value relations. Teacher layers are spread evenly over the student's."""

    text: float = 0.0
    logits: float = 1.0
    kind: losses.Divergence = "forward"
    temperature: float = 1.0
    hidden: float = 0.0
    distance: losses.Distance = "normalised"
    attention: float = 0.0
    relations: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.text, self.logits, self.hidden, self.attention, self.relations)
        if min(weights) < 0 or not any(weights):
            raise ValueError("the weights of the losses must not be negative, and one must be positive")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def needs_teacher(self) -> bool:
        return any((self.logits, self.hidden, self.attention, self.relations))


def loss_against(student: Network, teacher: Network | None, config: Objective) -> Callable[[Tensor], Tensor]:
    """The loss of one batch of ids (sequences, tokens). Raises :class:`CalibrationError` for another vocabulary."""
    if teacher is None and config.needs_teacher:
        raise CalibrationError("these losses compare with a teacher: give one, or set only `text`")
    if teacher is not None and teacher.model.config.vocab_size != student.model.config.vocab_size:
        raise CalibrationError(
            f"the teacher {teacher.model.checkpoint.source} has a vocabulary of {teacher.model.config.vocab_size}, the "
            f"student of {student.model.config.vocab_size}: they must share the tokenizer"
        )

    def loss(ids: Tensor) -> Tensor:
        inner, qkv = config.hidden > 0, config.attention > 0 or config.relations > 0
        ours = student.forward(ids, hidden=inner, qkv=qkv)
        total = ours.logits.new_zeros(())
        if config.text:
            total = total + config.text * losses.next_token(ours.logits, ids)
        if teacher is None or not config.needs_teacher:
            return total
        with torch.no_grad():
            theirs = teacher.forward(ids, hidden=inner, qkv=qkv)
        return total + _compare(ours, theirs, config)

    return loss


def _compare(ours: Output, theirs: Output, config: Objective) -> Tensor:
    total = ours.logits.new_zeros(())
    if config.logits:
        value = losses.divergence(ours.logits, theirs.logits, config.kind, config.temperature)
        total = total + config.logits * value
    if config.hidden:
        layers = losses.uniform_map(len(ours.hidden), len(theirs.hidden))
        total = total + config.hidden * losses.hidden(ours.hidden, theirs.hidden, layers, config.distance)
    if config.attention:
        total = total + config.attention * losses.attention(attention_map(ours), attention_map(theirs))
    if config.relations:
        heads = math.gcd(ours.qkv[-1][1].shape[1], theirs.qkv[-1][1].shape[1])
        terms = [losses.relations(a, b, heads) for a, b in zip(ours.qkv[-1], theirs.qkv[-1], strict=True)]
        total = total + config.relations * torch.stack(terms).mean()
    return total


def attention_map(output: Output) -> Tensor:
    """Causal attention of the last block by content alone (no positions), mean over heads: (batch, 1, tokens, tokens)."""
    q, k, _ = output.qkv[-1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1).mean(1, keepdim=True)


@torch.no_grad()
def held_out_loss(network: Network, windows: Tensor) -> float:
    """Mean next-token loss, nats, of ``windows`` (count, tokens), one at a time: log of the perplexity."""
    return sum(float(losses.next_token(network.forward(row[None]).logits, row[None])) for row in windows) / len(windows)


@torch.no_grad()
def cache_teacher(teacher: Network, data: Batches, steps: range, k: int, folder: Path) -> None:
    """Write the teacher's ``k`` largest log-probabilities for the batches of ``steps``, one file a step.

    Steps that are there are kept, so an interrupted caching goes on. Half precision; 6 bytes a candidate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        path = folder / f"{step:07d}.safetensors"
        if path.is_file():
            continue
        ids = data.at(step)
        log_p = torch.log_softmax(teacher.forward(ids).logits, -1)
        best = log_p.topk(k, -1)
        temporary = path.with_suffix(".new")
        save_file({"ids": ids, "indices": best.indices.int(), "log_probs": best.values.half()}, temporary)
        temporary.replace(path)


def loss_against_cache(student: Network, folder: Path) -> Callable[[Tensor], Tensor]:
    """KL against cached teachers: looks the windows of a batch up by their ids. One divergence a batch."""
    where: dict[bytes, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= {row.numpy().tobytes(): (path, i) for i, row in enumerate(file.get_tensor("ids"))}

    def loss(ids: Tensor) -> Tensor:
        indices, log_probs = [], []
        for row in ids:
            found = where.get(row.cpu().numpy().tobytes())
            if found is None:
                raise CalibrationError(
                    f"a window of the batch is not in the teacher's cache {folder}: cache those steps"
                )
            with safe_open(found[0], "pt") as file:
                indices.append(file.get_slice("indices")[found[1]])
                log_probs.append(file.get_slice("log_probs")[found[1]])
        chosen = torch.stack(indices).long().to(ids.device)
        return losses.top_k_divergence(
            student.forward(ids).logits, chosen, torch.stack(log_probs).float().to(ids.device)
        )

    return loss
