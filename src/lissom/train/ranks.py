"""Data-parallel training under ``torchrun``: the ranks split each batch and average gradients. Alone, nothing happens."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import CalibrationError


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``size`` processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls, backend: str = "gloo") -> Ranks:
        """The process group that ``torchrun`` describes in the environment; a single rank otherwise."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group(backend)
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch that all ranks know."""
        if batch.shape[0] % self.size:
            raise CalibrationError(f"a batch of {batch.shape[0]} does not divide over {self.size} processes")
        return batch[self.rank :: self.size]

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Mean over ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size

    def mean(self, value: float) -> float:
        """Mean of a number over ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor) / self.size
