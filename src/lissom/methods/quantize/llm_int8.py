"""LLM.int8(): the few inputs with outliers are multiplied in half precision, all others in INT8.

    O = {j: max_tokens |x_j| ≥ threshold},    Y = X_O W_Oᵀ + s_x ⊗ s_w · (q_X q_Wᵀ) over j ∉ O

W: (out, in), one scale per output row; X: (tokens, in), one scale per token, found at run time. The solver decides O
from the calibration's largest magnitudes and stores ``Columns(Codes)``; :func:`mixed_product` is the run's arithmetic
with O from the live tensor, as in the paper. threshold ∞ is vector-wise INT8, 0 is half precision.
Source: Dettmers, Lewis, Belkada, Zettlemoyer, NeurIPS 2022 (arXiv 2208.07339), eq. 8; methods/02 §17.
Differs: the solver's set O is static.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, Columns, Problem, Solved
from . import ranges
from .common import finish, grids, half, start


@dataclass(frozen=True)
class LLMInt8:
    """``threshold`` on the largest magnitude of an input."""

    threshold: float = 6.0


def mixed_product(X: Tensor, W: Tensor, threshold: float = 6.0) -> Tensor:
    """``X Wᵀ`` (tokens, out), with outlier inputs in half precision and int64 sums for the rest."""
    outlier = X.abs().amax(0) >= threshold
    y = half(X[:, outlier]) @ half(W[:, outlier]).T
    x, w = X[:, ~outlier], W[:, ~outlier]
    if not x.shape[1]:
        return y
    s_x, z = ranges.grid(*ranges.absmax(x), 8, symmetric=True)
    s_w, _ = ranges.grid(*ranges.absmax(w), 8, symmetric=True)
    q_x, q_w = ranges.encode(x, s_x, z, 8, True).long(), ranges.encode(w, s_w, torch.zeros_like(s_w), 8, True).long()
    return y + (q_x @ q_w.T).float() * s_x * s_w.T


def llm_int8(problem: Problem, config: LLMInt8) -> Solved:
    """Round all but the outlier inputs."""
    grids(problem, "llm-int8")
    W, mask = start(problem)
    index = (problem.stats.absmax >= config.threshold).nonzero()[:, 0]
    rest = W.index_fill(1, index, 0.0)  # outlier inputs must not widen the scales of the others
    params = problem.constraint.fit_all(rest)
    codes = Codes.round(rest, params, params.bits, problem.constraint.group_size)
    notes = {"outlier_inputs": len(index) / W.shape[1]}
    if not len(index):
        return finish(problem, codes, mask=mask, notes=notes)
    return finish(problem, stored=Columns(codes, index, half(W[:, index])), mask=mask, notes=notes)
