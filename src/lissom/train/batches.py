"""Batches that are a function of the step: resuming and dividing over ranks need no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import CalibrationError


@dataclass(frozen=True)
class Batches:
    """Random windows of ``length`` tokens of the text ``ids`` (tokens,), ``size`` of them a step.

    Step n is drawn by a generator seeded with (seed, n), so that any step can be made again alone.
    """

    ids: Tensor
    length: int
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) < self.length + 1:
            raise CalibrationError(
                f"the training text has {len(self.ids)} tokens, fewer than one window of {self.length}; "
                "use a longer text or a smaller length"
            )

    def starts(self, step: int) -> list[int]:
        """Where the windows of one step begin."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 62))
        return torch.randint(0, len(self.ids) - self.length, (self.size,), generator=generator).tolist()

    def at(self, step: int) -> Tensor:
        """(size, length)."""
        return torch.stack([self.ids[s : s + self.length] for s in self.starts(step)])


@dataclass(frozen=True)
class Mixture:
    """Windows from several texts; ``shares`` (one a text, positive) are normalised and may be replaced while training.

    Sheared LLaMA's dynamic batch loading replaces them by :func:`reweighted` (arXiv 2310.06694, §2.2).
    """

    texts: Mapping[str, Batches]
    shares: dict[str, float]
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if set(self.texts) != set(self.shares) or min(self.shares.values()) < 0 or sum(self.shares.values()) <= 0:
            raise CalibrationError(f"every text needs a share ≥ 0, and one a share above it: {dict(self.shares)}")

    def counts(self, step: int) -> dict[str, int]:
        """Windows of each text in one step."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 62))
        names = list(self.texts)
        p = torch.tensor([self.shares[n] for n in names], dtype=torch.float64)
        drawn = torch.multinomial(p / p.sum(), self.size, replacement=True, generator=generator)
        return {n: int((drawn == i).sum()) for i, n in enumerate(names)}

    def starts(self, step: int) -> list[int]:
        return [s for n, k in self.counts(step).items() for s in self.texts[n].starts(step)[:k]]

    def at(self, step: int) -> Tensor:
        parts = [self.texts[n].at(step)[:k] for n, k in self.counts(step).items() if k]
        return torch.cat(parts)


def reweighted(
    shares: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    eta: float = 1.0,
    smoothing: float = 1e-4,
) -> dict[str, float]:
    """p_d ∝ p_d · exp(η · max(loss_d − reference_d, 0)), mixed with a little of the uniform distribution."""
    top = max(max(losses[d] - reference[d], 0.0) for d in shares)
    raw = {
        d: p * torch.tensor(eta * (max(losses[d] - reference[d], 0.0) - top)).exp().item() for d, p in shares.items()
    }
    total = sum(raw.values())
    return {d: (1 - smoothing) * v / total + smoothing / len(raw) for d, v in raw.items()}
