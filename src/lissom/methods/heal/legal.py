"""Latent weights that can be trained, and the legal weights that they stand for.

    w = mask ∘ θ                                        sparse
    w = decode(round(mask ∘ θ)),   ∂w/∂θ := mask ∘ 1[in range]   on a grid: straight-through (arXiv 1308.3432)
    w = s e^t · round(θ / s e^t),  ∂w/∂t := w − θ · 1[in range]  where scales are learned too (LSQ, arXiv 1902.08153, in log space)

The mask and the zero points never change; a zero stays exactly zero, because zero is a level of every grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import Codes, GridParams, Solved, moved
from ...core.grid import spread_groups

_LEAST = 2.0**-24  # of half precision: a scale never becomes zero, by which weights are divided


class _Rounded(torch.autograd.Function):
    """Weights (out, in) on a grid whose scales stay, straight through: of the forward pass one byte a weight is kept.

    Autograd would keep several tensors of the weights' size, in every layer of the model at once. The gradient is
    that of ``minimum`` and ``maximum`` to the last bit: half of it passes where a weight lies on the end of the range.
    """

    @staticmethod
    def forward(ctx, w: Tensor, scales: Tensor, zeros: Tensor, top: float, group: int) -> Tensor:  # type: ignore[override]
        scale, zero = (spread_groups(t, w.shape[1], group) for t in (scales, zeros))
        steps = w / scale
        ctx.save_for_backward(scales, _halves(steps, -zero, top - zero))
        ctx.group = group
        return scale * steps.clamp_(-zero, top - zero).round_().add_(0.0)  # no negative zeros

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        scales, halves = ctx.saved_tensors
        scale = spread_groups(scales, gradient.shape[1], ctx.group)
        return gradient * scale * (halves * 0.5) / scale, None, None, None, None


def _halves(steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """2 inside of low … high, 1 on either end, 0 outside; int8. ``low`` < ``high``."""
    return ((steps >= low) & (steps <= high)).to(torch.int8) + ((steps > low) & (steps < high))


@dataclass(frozen=True)
class Legal:
    """The set of weights that one solved layer may take: ``mask`` (out, in) bool or None, ``codes`` with the grid or None."""

    mask: Tensor | None
    codes: Codes | None

    @classmethod
    def of(cls, solved: Solved) -> Legal | None:
        """The layer's set; None where the stored form is no uniform grid, so that the weights must stay as they are."""
        return None if solved.stored is not None else cls(solved.mask, solved.codes)

    def to(self, device: str | torch.device) -> Legal:
        return moved(self, torch.device(device))

    def scale(self, stretch: Tensor) -> Tensor:
        """The scales (out, groups) times e^``stretch``, as half precision holds them."""
        assert self.codes is not None
        free = (self.codes.scale * stretch.exp()).clamp_min(_LEAST)
        return free + (free.half().float() - free).detach()

    def weight(self, latent: Tensor, stretch: Tensor | None = None) -> Tensor:
        """Legal weights, (out, in), differentiable in ``latent``, and in ``stretch`` (out, groups) where scales are learned."""
        w = latent if self.mask is None else latent * self.mask
        if self.codes is None:
            return w
        top = 2.0**self.codes.bits - 1
        if stretch is None:
            return _Rounded.apply(w, self.codes.scale, self.codes.zero, top, self.codes.group_size)
        scale, zero = (
            spread_groups(t, w.shape[1], self.codes.group_size) for t in (self.scale(stretch), self.codes.zero)
        )
        steps = torch.minimum(torch.maximum(w / scale, -zero), top - zero)  # no gradient beyond the range
        return scale * (steps + (torch.round(steps) - steps).detach())

    @torch.no_grad()
    def solved(self, latent: Tensor, before: Solved, stretch: Tensor | None = None) -> Solved:
        """``before`` with the weights, and the codes, that ``latent`` and ``stretch`` stand for. The error is not known: NaN."""
        if stretch is not None and self.codes is not None:
            return Legal(self.mask, replace(self.codes, scale=self.scale(stretch))).solved(latent, before)
        w = latent.detach() if self.mask is None else torch.where(self.mask, latent.detach(), 0.0)
        error = torch.full_like(before.error, torch.nan)
        if self.codes is None:
            return replace(before, weight=w.clone(), error=error)
        c = self.codes
        codes = Codes.round(w, GridParams(c.scale, c.zero, torch.full_like(c.scale, 2.0**c.bits)), c.bits, c.group_size)
        return replace(before, weight=codes.decode(), codes=codes, error=error)
