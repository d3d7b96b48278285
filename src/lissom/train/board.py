"""Curves of a training for TensorBoard, where it is installed: event files that ``tensorboard --logdir`` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..core import OutputError


class Board:
    """Writes numbers by step into ``folder``; None: writes nothing. Raises :class:`OutputError` without tensorboard.

    A training that goes on after it was killed adds a file: TensorBoard joins them and takes the later value of a step.
    """

    def __init__(self, folder: Path | None):
        self._writer = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OutputError(
                "logs for TensorBoard need the package tensorboard: pip install 'lissom[tensorboard]', or set none"
            ) from None
        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise OutputError(f"cannot write TensorBoard logs into {folder}: {error}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve; values that are not finite are left out."""
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
