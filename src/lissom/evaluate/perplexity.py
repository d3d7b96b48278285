"""Quality of a checkpoint on disk: perplexity, bits per byte, KL and agreement against a dense model.

The model streams by block, so that checkpoints larger than memory can be judged. Protocol (methods/06 §C): the text is
tokenised once and cut into non-overlapping windows; each window predicts its tokens 2 … length;

    perplexity = exp(Σ NLL / Σ predicted tokens)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CalibrationError, CheckpointError, device_named
from ..export import open_model
from ..models import Model
from .text import load_text, tokenize, windows

Tick = Callable[[str, int, int], None]
_HEAD_TOKENS = 256  # logits of this many tokens at a time: a vocabulary of 256k is 256 MiB


@dataclass(frozen=True)
class Pass:
    """What one streamed forward gave: final hidden states per window, zeros and weights seen, seconds of loading."""

    hidden: list[Tensor]
    zeros: int
    weights: int
    load_seconds: float


@torch.no_grad()
def forward(model: Model, ids: Tensor, tick: Tick | None = None, label: str = "blocks") -> Pass:
    """Final hidden states of ``ids: (windows, tokens)``, one window at a time, one block in memory."""
    hidden = [model.embed(row[None]) for row in ids]
    zeros = weights = 0
    load = 0.0
    for i in range(model.blocks):
        start = time.perf_counter()
        block = model.load_block(i)
        load += time.perf_counter() - start
        for layer in model.linears(i):
            W = block.weight(layer.name)
            zeros += W.numel() - int(torch.count_nonzero(W))
            weights += W.numel()
        for j, h in enumerate(hidden):
            hidden[j] = block.forward(h)
        if tick:
            tick(label, i + 1, model.blocks)
    return Pass(hidden, zeros, weights, load)


def token_losses(model: Model, hidden: Tensor, ids: Tensor, outer: Mapping[str, Tensor] | None = None) -> Tensor:
    """−log p of each predicted token of one window, (tokens − 1,); ``hidden: (1, tokens, width)``, ``ids: (tokens,)``.

    ``outer``: tensors for the head instead of the file's."""
    out = []
    for at in range(0, len(ids) - 1, _HEAD_TOKENS):
        stop = min(at + _HEAD_TOKENS, len(ids) - 1)
        logits = model.head(hidden[:, at:stop].to(model.device), outer)[0].float()
        wanted = ids[at + 1 : stop + 1].to(logits.device)
        out.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(out).to(hidden.device)


def _compare(model: Model, dense: Model, h: Tensor, g: Tensor) -> tuple[float, int]:
    """Σ KL(dense ‖ model) in nats and the number of equal top tokens, over the predicted positions of one window."""
    kl, same = 0.0, 0
    last = h.shape[1] - 1
    for at in range(0, last, _HEAD_TOKENS):
        stop = min(at + _HEAD_TOKENS, last)
        p = torch.log_softmax(dense.head(g[:, at:stop].to(dense.device))[0].float(), -1)
        q = torch.log_softmax(model.head(h[:, at:stop].to(model.device))[0].float(), -1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return kl, same


@torch.no_grad()
def evaluate(
    source: str | Path,
    data: str = "builtin-heldout",
    length: int = 1024,
    count: int | None = 16,
    against: str | Path | None = None,
    tick: Tick | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Judge the checkpoint at ``source`` on the first ``count`` windows of ``length`` tokens of ``data``.

    Returns plain numbers: ``perplexity``, ``tokens`` (predicted), ``windows``, ``length``, ``bits_per_byte``, ``bytes`` of the
    weight files, ``parameters``, ``bits_per_weight`` = 8 · bytes / parameters, ``sparsity`` (zeros among the linear
    layers of the blocks), ``load_seconds``; ``device``: where blocks compute; with ``against`` also ``kl`` (nats a token, dense ‖ model),
    ``top1_agreement``, ``dense_perplexity`` and ``dense_bytes``.
    """
    if length < 2 or (count is not None and count < 1):
        raise CalibrationError(
            f"length must be at least 2 tokens and windows at least 1 (0 on the command line: all), not {length} and {count}"
        )
    checkpoint = open_model(source)
    place = device_named(device)
    model = Model(checkpoint, device=place)
    if not model.has_head:
        raise CheckpointError(
            f"{source} has no language-model head: perplexity needs a decoder, `similarity` judges encoders"
        )
    tokenizer = checkpoint.tokenizer()
    ids = windows(tokenize(tokenizer, load_text(str(data))), count, length)
    if against is not None:
        dense = Model(open_model(against), device=place)
        if dense.config.vocab_size != model.config.vocab_size:
            raise CalibrationError(
                f"{against} has a vocabulary of {dense.config.vocab_size}, {source} of {model.config.vocab_size}: "
                "KL needs the same tokenizer"
            )
    start = time.perf_counter()
    seen = forward(model, ids, tick, "evaluate")
    nll = sum(float(token_losses(model, h, row).double().sum()) for h, row in zip(seen.hidden, ids, strict=True))
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    characters = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in ids)
    size, parameters = checkpoint.bytes, model.parameters_count
    out: dict[str, Any] = {
        "model": str(source),
        "data": str(data),
        "perplexity": _exp(nll / tokens),
        "tokens": tokens,
        "windows": int(ids.shape[0]),
        "length": int(ids.shape[1]),
        "bits_per_byte": nll / math.log(2) / max(characters, 1),
        "bytes": size,
        "parameters": parameters,
        "bits_per_weight": 8 * size / parameters,
        "sparsity": seen.zeros / max(seen.weights, 1),
        "load_seconds": seen.load_seconds,
        "seconds": time.perf_counter() - start,
    }
    if against is not None:
        other = forward(dense, ids, tick, "dense")
        pairs = [_compare(model, dense, h, g) for h, g in zip(seen.hidden, other.hidden, strict=True)]
        reference = sum(
            float(token_losses(dense, g, row).double().sum()) for g, row in zip(other.hidden, ids, strict=True)
        )
        out |= {
            "against": str(against),
            "kl": sum(k for k, _ in pairs) / tokens,
            "top1_agreement": sum(s for _, s in pairs) / tokens,
            "dense_perplexity": _exp(reference / tokens),
            "dense_bytes": dense.checkpoint.bytes,
        }
    return out


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else float("inf")
