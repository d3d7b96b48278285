"""Calibration: text → token samples → hidden states of block 0, in batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import CalibrationError
from ..evaluate import fingerprint, load_text, samples, tokenize
from ..models import Model
from .sections import NONE, Calibration

_RANDOM_TOKENS = 64
_BATCH_TOKENS = 4096  # tokens that go through a block together: large products, small intermediates


@dataclass(frozen=True)
class CalibrationSet:
    """``ids: (samples, length)`` for the solvers; ``held_out: (windows, length)`` of text that no sample touches."""

    ids: Tensor
    held_out: Tensor
    text_tokens: int
    text: bool = True  # False: random tokens, from which nothing is learned
    at_once: bool = False  # statistics once per block

    @property
    def watch(self) -> int | None:
        """How many batches of hidden states feed statistics: all of them, or none."""
        return None if self.text else 0

    @property
    def hash(self) -> str:
        return fingerprint(self.ids)


def load_calibration(tokenizer: Any, settings: Calibration, vocabulary: int, held_out: int = 0) -> CalibrationSet:
    """Token samples; for the name ``none`` a few random tokens to check the artefact with. With ``held_out`` windows asked for, the last fifth of the text is kept apart for them."""
    if settings.data == NONE:
        generator = torch.Generator().manual_seed(settings.seed)
        ids = torch.randint(vocabulary, (1, min(settings.length, _RANDOM_TOKENS)), generator=generator)
        return CalibrationSet(ids, ids[:0], 0, text=False)
    ids = tokenize(tokenizer, load_text(settings.data))
    if len(ids) and int(ids.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer makes ids up to {int(ids.max())}, the model embeds {vocabulary}: they do not belong together"
        )
    apart = ids[:0].reshape(0, settings.length)
    text = ids
    if held_out:
        cut = len(ids) * 4 // 5
        text = ids[:cut]
        apart = samples(ids[cut:], held_out, settings.length, settings.seed + 1)
    return CalibrationSet(
        samples(text, settings.samples, settings.length, settings.seed),
        apart,
        len(ids),
        at_once=settings.statistics == "block",
    )


@torch.no_grad()
def embed(model: Model, ids: Tensor, outer: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Hidden states before block 0, (batch, tokens, width) each; ``outer``: tensors to use instead of the file's."""
    size = max(1, _BATCH_TOKENS // ids.shape[1])
    return [model.embed(batch, outer=outer) for batch in ids.split(size)]
