"""OBS with the empirical Fisher of the loss, block by block (Optimal BERT Surgeon).

    F = (1−ρ)·S + ρ·diag(S) + λ I,  S = (1/N) Σ gᵢ gᵢᵀ      over blocks of ``block`` neighbouring weights of a row,
                                                            gᵢ: gradients of single samples
    score_q = w_q² / (2 [F⁻¹]_qq)
    removed Q:   δ_K = F_KK⁻¹ F_KQ w_Q      for the kept weights K of the block (the joint optimum, not one by one)

Needs ``extras["samples"]``, (N, out, in).
Sources: Hassibi & Stork 1992; Kurtić et al., EMNLP 2022 (arXiv 2203.07259) for blocks of 50 and the joint update; methods/03 §3.
Differs: shrunk to its diagonal by ρ. The paper has a thousand gradients for blocks of 50; with the handful that one calibration set of
long sequences gives, S has no rank for the rest of a block, and 1 / [F⁻¹]_qq there is λ, the same for every weight: magnitude's
order. ρ = block / (block + N), as if the diagonal had been seen ``block`` times, goes to the paper's as N grows and to OBD at
small N. The blocks' inverses are computed directly instead of by N Woodbury updates (the same numbers, batched).
``error`` is reported in the layer's own Hessian, as for every solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core import Problem, Solved


@dataclass(frozen=True)
class OBS:
    """``block``: weights of a row whose second derivatives are kept. ``damping``: λ, a fraction of the mean diagonal.
    ``shrink``: ρ, 0 is the paper's, 1 the diagonal alone, none block / (block + N). ``update``: move the kept weights.
    """

    block: int = 50
    damping: float = 0.01
    shrink: float | None = None
    update: bool = True


def fisher_blocks(samples: Tensor, config: OBS) -> Tensor:
    """(out, blocks, block, block) of ``samples: (N, out, in)``; columns beyond the width are padded with λ I."""
    block = config.block
    count, rows, columns = samples.shape
    width = -(-columns // block) * block
    g = pad(samples, (0, width - columns)).reshape(count, rows, -1, block)
    F = torch.einsum("nrbi,nrbj->rbij", g, g) / count
    shrink = block / (block + count) if config.shrink is None else config.shrink
    diagonal = F.diagonal(dim1=2, dim2=3)
    kept = diagonal.clone()
    F *= 1 - shrink
    diagonal.copy_(kept)
    live = diagonal.sum() / max(1, rows * columns)
    diagonal += config.damping * live.clamp_min(1e-12)
    return F


def _fisher(problem: Problem, config: OBS) -> Tensor:
    return fisher_blocks(problem.extra("samples", "obs").to(problem.weight.dtype), config)


def _scores(W: Tensor, F: Tensor) -> Tensor:
    L, failed = torch.linalg.cholesky_ex(F)
    inverse = torch.linalg.inv(F) if bool(failed.any()) else torch.cholesky_inverse(L)  # half the time where it holds
    inverse = inverse.diagonal(dim1=2, dim2=3).reshape(len(W), -1)[:, : W.shape[1]]
    return W.square() / (2 * inverse.clamp_min(1e-30))


def obs_score(problem: Problem, config: OBS) -> Tensor:
    """(out, in)."""
    return _scores(problem.weight, _fisher(problem, config))


def obs(problem: Problem, config: OBS) -> Solved:
    """Keep the largest scores, move the kept weights of each block to the joint optimum."""
    W = problem.weight
    rows, columns = W.shape
    F = _fisher(problem, config)
    width = F.shape[1] * config.block
    score = _scores(W, F)
    if not config.update or not problem.constraint.sparse:
        return problem.project(score)
    mask = problem.constraint.select(score)
    keep = pad(mask, (0, width - columns)).reshape(rows, -1, config.block)
    w = pad(W, (0, width - columns)).reshape(rows, -1, config.block)
    removed = torch.where(keep, 0.0, w)
    pull = torch.where(keep, (F @ removed[..., None])[..., 0], 0.0)
    both = keep[..., :, None] & keep[..., None, :]
    A = torch.where(both, F, torch.diag_embed((~keep).to(F.dtype)))
    delta = torch.linalg.solve(A, pull[..., None])[..., 0]
    updated = torch.where(keep, w + delta, 0.0).reshape(rows, width)[:, :columns]
    return problem.project(mask.to(W.dtype), updated.contiguous())
