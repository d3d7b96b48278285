"""OATS: a sparse matrix plus a low-rank one, after scaling inputs by their second moment.

    W D ≈ S + L        D = diag(√(Σ x_c²))
    repeat   L ← best rank-r approximation of W D − S      S ← the largest entries of W D − L, row by row
    at the end W ≈ (S + L) D⁻¹

At compression ρ (the constraint's sparsity) the parameters that stay, (1−ρ)·out·in, are shared: the factors get the part κ,
r = κ(1−ρ)·out·in/(out+in), the sparse matrix the rest. κ = 0 is Wanda. N:M holds in S, and r comes on top so that κ is still
the factors' part of all parameters.

Source: Zhang & Papyan, ICLR 2025 (arXiv 2409.13652), algorithm 1–2; methods/03 §17 (80 alternations, κ = 0.25).
Differs: the rank-r approximation is a subspace iteration that starts from the last alternation's, two products instead of a full
decomposition; factors and S are rounded to half precision as stored. ``weight`` is the sum and has no zeros, so ``mask`` is
None; ``stored`` holds S and the factors, one form per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import HOST, Fixed, LowRank, NMByRow, Plain, Problem, RecipeError, Solved, Sparse, Stacked


@dataclass(frozen=True)
class OATS:
    """``rank_share``: κ. ``alternations``. ``seed`` of the first subspace."""

    rank_share: float = 0.25
    alternations: int = 80
    seed: int = 0


def top_subspace(M: Tensor, basis: Tensor) -> Tensor:
    """One step of subspace iteration: orthonormal (in, r) nearer to the leading right singular vectors of ``M``."""
    return torch.linalg.qr(M.T @ (M @ basis)).Q


def decompose(M: Tensor, pattern: object, rank: int, alternations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``M ≈ S + P Qᵀ``: S (out, in) under ``pattern``, P (out, r), Q (in, r) orthonormal."""
    S = torch.zeros_like(M)
    if rank == 0:
        return torch.where(pattern.select(M.square()), M, 0.0), M[:, :0], M.T[:, :0]  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(M.shape[1], rank, generator=generator, dtype=M.dtype, device=HOST).to(M.device)
    Q = torch.linalg.qr(start).Q
    P = M @ Q
    for step in range(alternations):
        R = M - S
        for _ in range(4 if step == 0 else 1):
            Q = top_subspace(R, Q)
        P = R @ Q
        rest = M - P @ Q.T
        S = torch.where(pattern.select(rest.square()), rest, 0.0)  # type: ignore[attr-defined]
    return S, P, Q


def oats(problem: Problem, config: OATS) -> Solved:
    """Every layer of the stack on its own: a product of factors is stored for one layer."""
    if problem.constraint.quantized:
        raise RecipeError("`oats` stores a sparse matrix and factors in half precision: leave out `bits`")
    if not 0 <= config.rank_share < 1:
        raise RecipeError(f"oats: rank_share must be in [0, 1), not {config.rank_share:g}")
    scale = problem.stats.norm.clamp_min(1e-12)
    parts = []
    for rows, part in problem.constraint.slices():
        W = problem.weight[rows]
        count, columns = W.shape
        pattern = part.pattern
        if pattern is None or pattern.p == 0:
            parts.append((count, Plain(W)))
            continue
        kept = 1 - pattern.p
        kappa = config.rank_share
        if isinstance(pattern, Sparse | NMByRow):
            pattern = replace(pattern, p=1 - (1 - kappa) * kept)
        elif not isinstance(pattern, Fixed):
            kept /= 1 - kappa
        rank = int(kappa * kept * count * columns / (count + columns)) if not isinstance(pattern, Fixed) else 0
        S, P, Q = decompose(W * scale, pattern, rank, config.alternations, config.seed)
        # factors of alike size lose least to half precision
        size = P.norm(dim=0).clamp_min(1e-30).sqrt()
        A, B = (P / size).half().float(), ((Q * size) / scale[:, None]).half().float()
        base = Plain((S / scale).half().float())
        parts.append((count, LowRank(base, A, B) if rank else base))
    stored = Stacked(tuple(parts))
    weight = stored.decode()
    zeros = sum(float((form.base if isinstance(form, LowRank) else form).decode().eq(0).sum()) for _, form in parts)
    notes = {"sparse_zeros": zeros / weight.numel()}
    if all(isinstance(form, Plain) for _, form in parts):
        return Solved(weight, None, weight != 0, problem.error(weight), notes)
    return Solved(weight, None, None, problem.error(weight), notes, stored)
