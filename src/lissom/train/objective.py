"""What a student is trained on: text, a teacher that runs along, or one whose answers are on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import CalibrationError
from ..methods.heal import losses
from ..methods.heal.objective import Objective, compare
from .batches import Batches
from .student import Network


def loss_against(
    student: Network, teacher: Network | None, config: Objective, run: Callable[..., Tensor] = compare
) -> Callable[[Tensor], Tensor]:
    """The loss of one batch of ids (sequences, tokens); ``run(ours, theirs, ids, config)`` makes it of both outputs.

    Raises :class:`CalibrationError` for another vocabulary."""
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
        if teacher is None or not config.needs_teacher:
            return run(ours, None, ids, config)
        with torch.no_grad():
            theirs = teacher.forward(ids, hidden=inner, qkv=qkv)
        return run(ours, theirs, ids, config)

    return loss


@torch.no_grad()
def held_out_loss(network: Network, windows: Tensor) -> float:
    """Mean next-token loss, nats, of ``windows`` (count, tokens), one at a time: log of the perplexity."""
    total = 0.0
    for row in windows.to(network.device):
        total += float(losses.next_token(network.forward(row[None]).logits, row[None]))
    return total / len(windows)


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
        found = {"ids": ids, "indices": best.indices.int(), "log_probs": best.values.half()}
        save_file({k: v.cpu() for k, v in found.items()}, temporary)
        temporary.replace(path)


def loss_against_cache(student: Network, folder: Path, config: Objective | None = None) -> Callable[[Tensor], Tensor]:
    """KL against cached teachers: looks the windows of a batch up by their ids. Of ``config``: the weights of this divergence
    (``logits``) and of the next-token loss (``text``)."""
    config = config or Objective()
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
        logits = student.forward(ids).logits
        value = config.logits * losses.top_k_divergence(logits, chosen, torch.stack(log_probs).float().to(ids.device))
        return value + config.text * losses.next_token(logits, ids) if config.text else value

    return loss
