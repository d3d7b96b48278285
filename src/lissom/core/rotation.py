"""Orthogonal matrices that are stored as a seed: ``Q = D P (F₁ ⊗ F₂ ⊗ …)``.

D holds random signs, P is a random permutation, the factors are small, so that applying Q to a vector of n entries
costs n · Σ size(F) multiplications instead of n². Sizes that are no power of two work: 576 = 9 · 64 takes a cosine
transform of size 9 and a Hadamard matrix of size 64 (every entry of either is at most √2 times the flattest possible).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .place import HOST, moved

Kind = Literal["hadamard", "orthogonal"]


@lru_cache(maxsize=32)
def hadamard(n: int) -> Tensor:
    """Sylvester's matrix, normalised: symmetric and orthogonal, entries ±1/√n. ``n`` must be a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Sylvester-Hadamard matrix needs a power of two, not {n}")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H / math.sqrt(n)).float()


@lru_cache(maxsize=32)
def cosine(n: int) -> Tensor:
    """The orthonormal DCT-II matrix (n, n): ``√(2/n) cos(π (2j+1) k / 2n)``, first row ``1/√n``."""
    j, k = torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)[:, None]
    C = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * k / (2 * n))
    C[0] /= math.sqrt(2)
    return C.float()


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniform (Haar) orthogonal matrix: QR of a Gaussian with the signs of R's diagonal taken out."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).float()


@dataclass(frozen=True)
class Rotation:
    """An orthogonal (size, size) matrix given by its seed.

    ``hadamard``: signs, then cosine(odd part) ⊗ Hadamard(power of two) – no permutation, as in QuaRot.
    ``orthogonal``: signs, permutation, then two Haar-random factors of nearly equal size, as in QuIP.
    """

    size: int
    seed: int
    kind: Kind = "hadamard"

    def _parts(self, device: torch.device) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        with HOST:  # the same numbers everywhere, and kept for everyone
            parts = _build(self.size, self.seed, self.kind)
        return moved(parts, device)

    def apply(self, x: Tensor) -> Tensor:
        """``x @ Q`` along the last axis."""
        signs, permutation, factors = self._parts(x.device)
        y = x * signs
        if permutation is not None:
            y = y[..., permutation]
        return _kronecker(y, factors)

    def undo(self, x: Tensor) -> Tensor:
        """``x @ Qᵀ`` along the last axis."""
        signs, permutation, factors = self._parts(x.device)
        y = _kronecker(x, tuple(f.T for f in factors))
        if permutation is not None:
            y = y[..., permutation.argsort()]
        return y * signs

    def matrix(self) -> Tensor:
        """Q itself."""
        return self.apply(torch.eye(self.size))


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """An orthogonal matrix given by its entries, (size, size), with the interface of :class:`Rotation`."""

    entries: Tensor

    @property
    def size(self) -> int:
        return len(self.entries)

    def apply(self, x: Tensor) -> Tensor:
        """``x @ Q`` along the last axis."""
        return x @ self.entries.to(x.device)

    def undo(self, x: Tensor) -> Tensor:
        """``x @ Qᵀ`` along the last axis."""
        return x @ self.entries.T.to(x.device)

    def matrix(self) -> Tensor:
        """Q itself."""
        return self.entries


@lru_cache(maxsize=64)
def _build(size: int, seed: int, kind: Kind) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=g).float() * 2 - 1
    if kind == "hadamard":
        power = size & -size
        half = 1 << ((power.bit_length() - 1) // 2)  # H(64) = H(8) ⊗ H(8): two small products
        factors = [cosine(size // power), hadamard(half), hadamard(power // half)]
        return signs, None, tuple(f for f in factors if len(f) > 1)
    permutation = torch.randperm(size, generator=g)
    p = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    return signs, permutation, tuple(random_orthogonal(n, g) for n in (p, size // p) if n > 1)


def _kronecker(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """``x @ (F₁ ⊗ F₂ ⊗ …)`` along the last axis, one small product per factor."""
    shape, lead = x.shape, x.numel() // max(x.shape[-1], 1)
    before, after = 1, x.shape[-1]
    y = x.reshape(lead, -1)
    for f in factors:
        after //= len(f)
        y = torch.einsum("bnma,mk->bnka", y.reshape(lead, before, len(f), after), f.to(y.dtype)).reshape(lead, -1)
        before *= len(f)
    return y.reshape(shape)
