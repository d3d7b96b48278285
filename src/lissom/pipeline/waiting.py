"""Where the state of batches waits between the stages of a block: in the host's memory, or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import HOST, OutputError, moved, room
from ..models import Block


class Aside:
    """Keeps the state of waiting batches in the host's memory, out of that of the device."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, Tensor]] = {}

    def put(self, index: int, state: dict[str, Any]) -> None:
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        self._keep(index, moved(tensors, HOST))
        for key in tensors:
            del state[key]

    def get(self, index: int, state: dict[str, Any], device: torch.device) -> None:
        state.update(moved(self._take(index), device))

    def _keep(self, index: int, tensors: dict[str, Tensor]) -> None:
        self._kept[index] = tensors

    def _take(self, index: int) -> dict[str, Tensor]:
        return self._kept.pop(index, {})


def aside(block: Block, hidden: Sequence[Tensor]) -> Aside | None:
    """Where batches wait between the stages of a block on a device: None for there, where twice what waits has room."""
    widest = max(layer.columns for layer in block.linears)
    waiting = 4 * sum(h.numel() + h.shape[0] * h.shape[1] * widest for h in hidden)
    return None if block.device.type == "cpu" or 2 * waiting <= room(block.device) else Aside()


class Spill(Aside):
    """Keeps it on disk: one file per batch, removed when done."""

    def __init__(self, folder: Path):
        self._folder = Path(tempfile.mkdtemp(prefix="spill-", dir=folder))

    def _keep(self, index: int, tensors: dict[str, Tensor]) -> None:
        try:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, self._path(index))
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot spill activations to {self._folder}: {error}. Make room or run without --spill"
            ) from error

    def _take(self, index: int) -> dict[str, Tensor]:
        if not self._path(index).exists():
            return {}
        found = load_file(self._path(index))
        self._path(index).unlink()
        return found

    def close(self) -> None:
        for path in self._folder.glob("*"):
            path.unlink()
        self._folder.rmdir()

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"
