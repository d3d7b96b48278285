"""Calibration and evaluation text: names or files → token ids → samples and windows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CalibrationError


def _builtin(held_out: bool) -> Callable[[], str]:
    """Python's own help topics: four of five to calibrate on, every fifth held out, so that the two never overlap."""

    def load() -> str:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for i, key in enumerate(sorted(topics)) if (i % 5 == 1) == held_out)

    return load


def _hub(path: str, config: str | None, split: str, field: str, joiner: str, limit: int | None = None):
    def load() -> str:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CalibrationError(
                f"the data set {path!r} comes from the Hugging Face hub: pip install 'lissom[data]', or give a text file"
            ) from None
        try:
            rows = load_dataset(path, config, split=split, streaming=limit is not None)
            texts = []
            for i, row in enumerate(rows):
                if limit is not None and i >= limit:
                    break
                texts.append(row[field])
        except Exception as error:
            raise CalibrationError(
                f"the data set {path!r} ({split}) could not be loaded from the hub ({type(error).__name__}: {error}); "
                "give a text file instead"
            ) from error
        return joiner.join(texts)

    return load


NAMED: dict[str, Callable[[], str]] = {
    "builtin": _builtin(held_out=False),
    "builtin-heldout": _builtin(held_out=True),
    "wikitext2": _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n\n"),
    "wikitext2-train": _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", "\n\n"),
    "wikitext2-valid": _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", "text", "\n\n"),
    "c4": _hub("allenai/c4", "en", "train", "text", "\n\n", limit=8000),
    "c4-valid": _hub("allenai/c4", "en", "validation", "text", " ", limit=1100),
}


def load_text(source: str) -> str:
    """The text of a file, or of one of :data:`NAMED`. Raises :class:`CalibrationError` when it is empty or unknown."""
    if source in NAMED and not Path(source).exists():
        return NAMED[source]()
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"no text file {source!r}; give a path, or one of {', '.join(NAMED)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise CalibrationError(f"{source} is empty")
    return text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """All token ids of the text, (tokens,) int64, as the tokenizer makes them by default."""
    ids = tokenizer(text, return_tensors=None, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def samples(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """``count`` random slices of ``length`` tokens, (count, length); the same for the same seed."""
    if len(ids) < length + 1:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, fewer than one sample of length {length}; "
            "use a longer text or a smaller --length"
        )
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def windows(ids: Tensor, count: int | None, length: int) -> Tensor:
    """The first ``count`` (None: all) non-overlapping windows, (windows, length)."""
    available = len(ids) // length
    if available < 1:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, fewer than one window of length {length}; "
            "use a longer text or a smaller --length"
        )
    n = available if count is None else min(count, available)
    return ids[: n * length].reshape(n, length)


def fingerprint(ids: Tensor) -> str:
    """Hash of token ids."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]
