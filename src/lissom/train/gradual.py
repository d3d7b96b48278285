"""Gradual magnitude pruning while a model trains: masks lose their smallest weights along a cubic (Zhu & Gupta 2017).

    s(t) = s_f + (s_i − s_f) (1 − t / t_f)³        t: progress of the training, in ``updates`` steps until ``rise`` = t_f

Every layer comes from its own sparsity s_i to the same s_f; what is masked once stays at zero (arXiv 1710.01878). The mask is a
leaf without a gradient, so that it is saved and resumed with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .forms import Latent
from .schedules import cubic


class Gradual:
    """Raises the sparsity of ``forms`` (name → form, whose masks are replaced by growing ones) to ``sparsity``."""

    def __init__(self, forms: Mapping[str, Latent], sparsity: float, updates: int = 20, rise: float = 0.6):
        self.forms, self.sparsity, self.updates, self.rise = dict(forms), sparsity, updates, rise
        self.initial: dict[str, float] = {}
        for name, form in self.forms.items():
            old = form.legal.mask
            mask = torch.ones_like(form.value, dtype=torch.bool) if old is None else old.clone()
            form.legal = replace(form.legal, mask=mask)
            self.initial[name] = 1 - float(mask.float().mean())
        self._last = -1

    def leaves(self) -> dict[str, Tensor]:
        out = {}
        for name, form in self.forms.items():
            assert form.legal.mask is not None
            out[f"{name}:mask"] = form.legal.mask
        return out

    @torch.no_grad()
    def step(self, step: int, progress: float) -> None:
        """For ``before_step`` of the loop. The same progress gives the same masks again, so a resumed training goes on."""
        level = min(math.floor(progress / self.rise * self.updates + 1e-9), self.updates)
        if level == self._last:
            return
        self._last = level
        for name, form in self.forms.items():
            mask = form.legal.mask
            assert mask is not None
            wanted = cubic(level / self.updates, self.sparsity, self.initial[name])
            remain = mask.numel() - round(wanted * mask.numel())
            gone = int(mask.sum()) - remain
            if gone > 0:
                size = form.value.abs().masked_fill(~mask, math.inf).flatten()
                mask.view(-1)[size.topk(gone, largest=False).indices] = False
