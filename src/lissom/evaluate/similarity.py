"""Quality of an encoder on disk: how far its sentence embeddings, and the similarities between them, move.

The text is cut into pieces of equal length, each between the tokenizer's first and last token; the embedding of a piece is
the mean of its final hidden states. With e of the dense model and ê of the one that is judged:

    cosine              cos(e_i, ê_i)                                   mean and least over pieces
    similarity_error    |cos(e_i, e_j) − cos(ê_i, ê_j)|, i < j          mean and largest over pairs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core import CalibrationError
from ..export import is_integer, load_encoder, open_model
from ..models import Model
from .perplexity import Tick, forward
from .text import load_text, tokenize, windows


def is_encoder(source: str | Path) -> bool:
    """Whether ``source`` gives embeddings instead of logits."""
    return is_integer(source) or not Model(open_model(source)).has_head


def pieces(tokenizer: Any, rows: Tensor) -> Tensor:
    """``rows: (count, length)`` of plain ids between the tokenizer's first and last token."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    ends = [torch.full((len(rows), 1), token, dtype=rows.dtype) for token in (first, last) if token is not None]
    return torch.cat([ends[0], rows, ends[1]], 1) if len(ends) == 2 else rows


def embeddings(source: str | Path, ids: Tensor, tick: Tick | None = None, label: str = "evaluate") -> Tensor:
    """Embeddings of length 1, (pieces, width), for any encoder that lissom opens."""
    if is_integer(source):
        return load_encoder(source).embed(ids)
    model = Model(open_model(source))
    return normalize(torch.stack([h[0].mean(0) for h in forward(model, ids, tick, label).hidden]), dim=1)


@torch.no_grad()
def similarity(
    source: str | Path, against: str | Path | None, data: str, length: int, count: int | None, tick: Tick | None = None
) -> dict[str, Any]:
    """The measures above for ``source``, on ``count`` pieces of ``length`` tokens of ``data``, as plain numbers.

    Raises :class:`CalibrationError` without a dense model ``against`` which to measure, or for fewer than two pieces.
    """
    if against is None:
        raise CalibrationError(
            f"{source} is an encoder: give the dense one with --against, its embeddings are compared"
        )
    dense = Model(open_model(against))
    tokenizer = dense.checkpoint.tokenizer()
    longest = dense.config.max_position_embeddings - 2
    rows = windows(tokenize(tokenizer, load_text(data)), count, min(length, longest))
    if len(rows) < 2:
        raise CalibrationError("two windows at least are needed to compare similarities")
    ids = pieces(tokenizer, rows)
    theirs, ours = embeddings(against, ids, tick, "dense"), embeddings(source, ids, tick)
    cosine = (theirs * ours).sum(1)
    upper = torch.triu(torch.ones(len(ids), len(ids), dtype=torch.bool), 1)
    moved = (theirs @ theirs.T - ours @ ours.T).abs()[upper]
    judged: Any = load_encoder(source) if is_integer(source) else open_model(source)
    parameters = dense.parameters_count
    return {
        "model": str(source), "data": data, "windows": len(ids), "length": int(ids.shape[1]), "against": str(against),
        "cosine": float(cosine.mean()), "cosine_min": float(cosine.min()),
        "similarity_error": float(moved.mean()), "similarity_error_max": float(moved.max()),
        "bytes": judged.bytes, "parameters": parameters, "bits_per_weight": 8 * judged.bytes / parameters,
        "dense_bytes": dense.checkpoint.bytes,
    }  # fmt: skip
