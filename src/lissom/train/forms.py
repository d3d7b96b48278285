"""Forms: how a weight of the student is made from what is trained.

A form has ``leaves()``, the tensors that are trained, ``weight()``, the tensor that the forward pass uses, differentiable
in the leaves, and ``final()``, the same as it is stored. The mask and grid of a :class:`Legal` hold for every form, at
every step: what the loss sees is what the file will hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..core import Solved
from ..methods.heal.legal import Legal

_FREE = Legal(None, None)


class Form(Protocol):
    """What the training loop needs of a trained weight."""

    def leaves(self) -> dict[str, Tensor]: ...
    def to(self, device: str | torch.device) -> None: ...
    def weight(self) -> Tensor: ...
    def final(self) -> Tensor: ...


@dataclass
class Latent:
    """All entries are trained: ``value`` (any shape) in full precision behind the mask and the grid of ``legal``."""

    value: Tensor
    legal: Legal = _FREE

    @classmethod
    def of(cls, solved: Solved) -> Latent | None:
        """The weights of a solved layer; None where its stored form allows no other weights."""
        legal = Legal.of(solved)
        return None if legal is None else cls(solved.weight.clone(), legal)

    def __post_init__(self) -> None:
        self.value.requires_grad_()

    def leaves(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def to(self, device: str | torch.device) -> None:
        self.value, self.legal = _moved(self.value, device), self.legal.to(device)

    def weight(self) -> Tensor:
        return self.legal.weight(self.value)

    def final(self) -> Tensor:
        return _final(self.value, self.legal)


@dataclass
class LoRA:
    """``base + (α / r) · B A`` with the base frozen (Hu et al. 2021, arXiv 2106.09685), behind the mask and grid of ``legal``.

    ``base`` (out, in); ``A`` (r, in) starts random, ``B`` (out, r) at zero, so that training starts at the base. Merging is
    exact, always: without a grid the sum is the weight (masked entries stay zero); with one, the sum was trained through
    the fake quantizer, and its codes are what is stored. Memory of the optimiser: r (in + out) instead of in · out.
    """

    base: Tensor
    rank: int = 8
    alpha: float = 16.0
    legal: Legal = _FREE
    seed: int = 0
    A: Tensor = field(init=False)
    B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.base.shape
        if not 1 <= self.rank <= min(rows, columns):
            raise ValueError(f"rank must be 1 … {min(rows, columns)} for a weight of {rows}×{columns}, not {self.rank}")
        generator = torch.Generator().manual_seed(self.seed)
        bound = math.sqrt(1 / columns)
        self.A = ((2 * torch.rand(self.rank, columns, generator=generator) - 1) * bound).to(self.base).requires_grad_()
        self.B = torch.zeros(rows, self.rank).to(self.base).requires_grad_()

    def leaves(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def to(self, device: str | torch.device) -> None:
        self.base, self.legal = self.base.to(device), self.legal.to(device)
        self.A, self.B = _moved(self.A, device), _moved(self.B, device)

    def merged(self) -> Tensor:
        return self.base + (self.alpha / self.rank) * (self.B @ self.A)

    def weight(self) -> Tensor:
        return self.legal.weight(self.merged())

    def final(self) -> Tensor:
        return _final(self.merged(), self.legal)


@dataclass
class HardConcrete:
    """Learned gates z in [0, 1] that reach 0 and 1 (Louizos et al. 2018, arXiv 1712.01312, eq. 10–12).

    s = σ((log u − log(1−u) + log α) / β),   z = clip(s (ζ − γ) + γ, 0, 1),   P(z ≠ 0) = σ(log α − β log(−γ / ζ))

    ``log_alpha`` (count,), trained. Sampled while training (:meth:`sample`), else the median gate.
    """

    log_alpha: Tensor
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    noise: Tensor | None = None

    @classmethod
    def start(cls, count: int, open_probability: float = 0.95) -> HardConcrete:
        """Gates that are open with the given probability."""
        p = open_probability
        return cls(torch.full((count,), math.log(p / (1 - p)) + 2 / 3 * math.log(0.1 / 1.1)))

    def __post_init__(self) -> None:
        self.log_alpha.requires_grad_()

    def to(self, device: str | torch.device) -> None:
        self.log_alpha = _moved(self.log_alpha, device)
        self.noise = None if self.noise is None else self.noise.to(device)

    def sample(self, generator: torch.Generator) -> None:
        """Draw the noise of the next steps; :meth:`settle` goes back to the deterministic gate."""
        noise = torch.rand(self.log_alpha.shape, generator=generator, device=generator.device)
        self.noise = noise.clamp(1e-6, 1 - 1e-6).to(self.log_alpha.device)

    def settle(self) -> None:
        self.noise = None

    def value(self) -> Tensor:
        if self.noise is None:
            s = torch.sigmoid(self.log_alpha)
        else:
            s = torch.sigmoid((self.noise.log() - (1 - self.noise).log() + self.log_alpha) / self.beta)
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def open(self) -> Tensor:
        """P(z ≠ 0) of each gate."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))


@dataclass
class Frozen:
    """Not trained at all: ``value`` of any shape. What gates are put on where the weights stay."""

    value: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {}

    def to(self, device: str | torch.device) -> None:
        self.value = self.value.to(device)

    def weight(self) -> Tensor:
        return self.value

    def final(self) -> Tensor:
        return self.value


@dataclass
class Gated:
    """``inner`` with its inputs (``side`` columns) or outputs (rows; of a bias: its entries) scaled by gates.

    ``unit`` (in,) or (out,) says which gate each of them belongs to. Forms nest: ``label`` names the leaf of this one.
    """

    inner: Form
    gates: HardConcrete
    unit: Tensor
    side: Literal["columns", "rows"] = "columns"
    label: str = "log_alpha"

    def leaves(self) -> dict[str, Tensor]:
        return {**self.inner.leaves(), self.label: self.gates.log_alpha}

    def to(self, device: str | torch.device) -> None:
        self.inner.to(device)
        self.gates.to(device)
        self.unit = self.unit.to(device)

    def _factor(self, like: Tensor) -> Tensor:
        z = self.gates.value()[self.unit]
        return z if self.side == "columns" or like.dim() == 1 else z[:, None]

    def weight(self) -> Tensor:
        w = self.inner.weight()
        return w * self._factor(w)

    @torch.no_grad()
    def final(self) -> Tensor:
        w = self.inner.final()
        return w * self._factor(w)


def _moved(leaf: Tensor, device: str | torch.device) -> Tensor:
    return (
        leaf
        if leaf.device == torch.empty(0, device=device).device
        else leaf.detach().to(device).requires_grad_(leaf.requires_grad)
    )


def solved_of(form: Latent | LoRA, before: Solved) -> Solved:
    """``before`` with what was trained: on its mask, and on its grid with codes."""
    latent = form.value if isinstance(form, Latent) else form.merged()
    new = form.legal.solved(latent, before)
    return replace(new, error=before.error)


@torch.no_grad()
def _final(latent: Tensor, legal: Legal) -> Tensor:
    empty = Solved(latent.detach(), legal.codes, legal.mask, latent.new_zeros(latent.shape[:1]))
    return legal.solved(latent, empty).weight
