"""LoftQ: quantized weights and the low-rank adapter that corrects them, found together.

    minimise ‖W − Q − A Bᵀ‖_F:    repeat  Q = quant(W − A Bᵀ);   U Σ Vᵀ = svd(W − Q);   A = U_r √Σ_r, B = V_r √Σ_r

W: (out, in), A: (out, r), B: (in, r). The start of LoRA training on a quantized base, and a correction in its own
right. The best round is kept, so the error never exceeds that of plain rounding. Stored: ``LowRank(base)`` with
A, B in fp16. ``weighted``: the error of the layer's outputs instead, tr(Δ H Δᵀ), by the same steps on W H^½ (LQER's and
QERA's closed form, 2410.06040). A mask is applied to the sum, so its zeros are exact but stored beside.
Source: Li et al., ICLR 2024 (arXiv 2310.08659), algorithm 1; methods/02 §27. Differs: best round kept; weighting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Codes, Grid, LowRank, Masked, Problem, Solved, Stored, damped
from .codebook import known
from .common import finish, grids, half, layers, restack, start


@dataclass(frozen=True)
class LoftQ:
    """``rounds`` T, ``rank`` r; ``base`` uniform (the constraint's grid) | nf; ``damping`` of H when ``weighted``."""

    rank: int = 16
    rounds: int = 5
    base: Literal["uniform", "nf"] = "uniform"
    weighted: bool = False
    damping: float = 0.01


def _roots(H: Tensor) -> tuple[Tensor, Tensor]:
    """H^½ and H^−½ of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(H.double())
    values = values.clamp_min(float(values.max()) * 1e-10).sqrt()
    return ((vectors * values) @ vectors.T).float(), ((vectors / values) @ vectors.T).float()


def _round(W: Tensor, grid: Grid, config: LoftQ) -> Stored:
    group = min(grid.group_size or W.shape[1], W.shape[1])
    if config.base == "nf":
        return known(W, "nf", grid.bits, group, 1.0)
    return Codes.round(W, grid.fit_all(W), grid.bits, group)


def loftq(problem: Problem, config: LoftQ) -> Solved:
    """Every layer of the stack with an adapter of its own."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "loftq"), strict=True):
        W, mask = start(layer)
        rank = min(config.rank, *W.shape)
        root = inverse = None
        if config.weighted:
            root, inverse = _roots(damped(layer.stats.hessian, config.damping)[0])
        A, B = torch.zeros(W.shape[0], rank), torch.zeros(W.shape[1], rank)
        best: LowRank | None = None
        least = first = torch.inf
        for i in range(max(1, config.rounds)):
            base = _round(W - A @ B.T, grid, config)
            rest = W - base.decode()
            if i == 0:
                first = float((rest if root is None else rest @ root).norm())
            U, S, Vh = torch.linalg.svd(rest if root is None else rest @ root, full_matrices=False)
            A = half(U[:, :rank] * S[:rank].sqrt())
            V = Vh[:rank].T * S[:rank].sqrt()
            B = half(V if inverse is None else inverse @ V)
            error = rest - A @ B.T
            size = float((error if root is None else error @ root).norm())
            if size < least or best is None:
                best, least = LowRank(base, A, B), size
        assert best is not None
        form: Stored = best if mask is None else Masked(best, mask)
        notes = {"error_without": first, "error_with": least}
        out.append(finish(layer, stored=form, mask=mask, notes=notes, damping=config.damping))
    return restack(problem, out)
