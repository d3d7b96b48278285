"""QuIP: rotate the layer until no weight and no direction of H stands out, then round with error feedback.

    d = (diag H / diag WᵀW)^¼,          W ← W · diag d,          H ← diag(1/d) H diag(1/d)
    L, R random orthogonal (seeds),     W ← Lᵀ W R,              H ← Rᵀ H R
    LDLQ: Ŵ_k = Q(W_k + (W_{<k} − Ŵ_{<k}) Ů_{<k,k}), H = (Ů+I) D (Ů+I)ᵀ      = the feedback sweep (GPTQ)
    then ``passes`` of greedy coordinate descent (LDLQ-RG)
    grid: 2^b levels between ± reach · RMS(row); undone after rounding: Ŵ = L Q Rᵀ / d

W: (out, in), H damped by ``damping``. ``reach`` None: the best of several by the layer's error (2.4 is the paper's).
Stored: codes of the rotated weights, two fp16 numbers per row, d and two seeds: ``Scaled(Rotated(Affine))``. The run
multiplies by Rᵀ/d before and L after; a decoded dense weight is exact too. A mask is applied to the decoded weights
(rotated codes cannot hold zeros), so its zeros are exact but must be stored beside.
Source: Chee, Cai, Kuleshov, De Sa, NeurIPS 2023 (arXiv 2307.13304); methods/02 §14. Differs: a scale per row, not per
tensor; reach is searched; scales are re-fitted in closed form; ``hadamard`` (QuIP#, 2402.04396) beside ``orthogonal``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Affine, GridParams, Masked, Problem, Rotated, Rotation, Scaled, Solved, Stored, damped, factorise
from ...core.rotation import Kind
from .common import feedback, finish, grids, half, layers, restack, start
from .coordinate import descend

_REACHES = (1.2, 1.5, 1.8, 2.1, 2.4, 2.8)


@dataclass(frozen=True)
class QuIP:
    """Names as in the module. ``rescale``: apply d. ``seed`` is mixed with the layer's name."""

    passes: int = 4
    reach: float | None = None
    rescale: bool = True
    rotation: Kind = "orthogonal"
    damping: float = 0.01
    seed: int = 0


def incoherent(W: Tensor, H: Tensor, left: Rotation, right: Rotation, rescale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated W (out, in), rotated H (in, in) and d (in,), fp16-exact (ones without ``rescale``)."""
    d = torch.ones(W.shape[1])
    if rescale:
        d = (H.diagonal() / W.square().sum(0).clamp_min(1e-12)).clamp_min(1e-12).pow(0.25)
        d = half((d / d.log().mean().exp()).clamp(1e-3, 1e3))
    turned = right.apply(right.apply(H / d / d[:, None]).T.contiguous())
    return Rotated.forward(W * d, left, right), (turned + turned.T) / 2, d


def quantize_rotated(W: Tensor, H: Tensor, U: Tensor, bits: int, reach: float, passes: int) -> Affine:
    """LDLQ and greedy passes on rows with 2^bits levels between ± reach · RMS."""
    top = 2.0**bits - 1
    rms = W.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
    scale = half(2 * reach * rms / top).clamp_min(2.0**-24)
    offset = half(-scale * top / 2)
    zero = -offset / scale
    grid = GridParams(scale[:, 0], zero[:, 0], torch.full_like(scale[:, 0], top + 1))
    codes = torch.empty_like(W)

    def choose(column: int, w: Tensor) -> Tensor:
        codes[:, column] = torch.round(w / grid.scale + grid.zero).clamp(0, top)
        return grid.decode(codes[:, column])

    feedback(W, U, choose)
    wide = GridParams(*(t[:, None].expand_as(W) for t in (grid.scale, grid.zero, grid.levels)))
    for _ in range(passes):
        codes = descend(W, H, codes, wide, None)
    return Affine(codes.to(torch.uint8), scale, offset, bits, W.shape[1])


def quip(problem: Problem, config: QuIP) -> Solved:
    """Every layer of the stack under rotations of its own."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "quip"), strict=True):
        W, mask = start(layer)
        rows, columns = W.shape
        seed = config.seed + zlib.crc32(layer.names[0].encode())
        left, right = Rotation(rows, seed, config.rotation), Rotation(columns, seed + 1, config.rotation)
        H, dead = damped(layer.stats.hessian, config.damping)
        turned, K, d = incoherent(torch.where(dead, torch.zeros_like(W), W), H, left, right, config.rescale)
        U = factorise(K, config.damping).U
        K, _ = damped(K, config.damping)
        best: Affine | None = None
        least, chosen = torch.inf, 0.0
        for reach in _REACHES if config.reach is None else (config.reach,):
            # the search needs only the order of the errors: one sweep each
            trial = quantize_rotated(turned, K, U, grid.bits, reach, 0 if config.reach is None else config.passes)
            delta = trial.decode() - turned
            error = float(((delta @ K) * delta).sum())
            if error < least or best is None:
                best, least, chosen = trial, error, reach
        assert best is not None
        if config.reach is None:
            best = quantize_rotated(turned, K, U, grid.bits, chosen, config.passes)
        form: Stored = Rotated(best, left, right)
        if config.rescale:
            form = Scaled(form, 1 / d)
        if mask is not None:
            form = Masked(form, mask)
        notes = {"reach": chosen, "peak_before": _peak(W), "peak_after": _peak(turned)}
        out.append(finish(layer, stored=form, mask=mask, notes=notes, damping=config.damping))
    return restack(problem, out)


def _peak(W: Tensor) -> float:
    """Largest weight over root mean square: what incoherence lowers."""
    return float(W.abs().max() / W.square().mean().sqrt().clamp_min(1e-12))
