"""SmoothQuant: divide outlier inputs by s and multiply their weights, so that both quantize well to 8 bits.

    s_j = max|X_j|^α / max_r|W_rj|^(1−α),     x ← x/s,   W ← W · diag(s)

W: (out, in), s: (in,), shared by the layers of a stack. The function is unchanged; 1/s folds into the norm or linear
that makes x (:func:`fold_into_norm`, :func:`fold_into_linear`). The solver rounds W·s to the constraint's grid and
stores ``Scaled(Codes)``; ``fake_activation`` of x/s is the other half of W8A8.
α ½ for OPT and BLOOM, .75–.85 for LLaMA. Source: Xiao et al., ICML 2023 (arXiv 2211.10438), eq. 4; methods/02 §16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, Problem, Scaled, Solved
from .common import finish, grids, half, start


@dataclass(frozen=True)
class SmoothQuant:
    """``alpha``: 0 leaves activations alone, 1 moves all of their range to the weights."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (in,), fp16-exact, for ``activation: (in,)`` = max|X_j| and ``weight: (out, in)``; 1 where either is all zero."""
    w = weight.abs().amax(0)
    s = half((activation.pow(alpha) / w.clamp_min(1e-12).pow(1 - alpha)).clamp(1e-4, 1e4))
    return torch.where((activation > 0) & (w > 0), s, torch.ones_like(s))


def fold_into_norm(gain: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gain and bias (in,) of the norm that makes x, so that it makes x/s."""
    return gain / s, None if bias is None else bias / s


def fold_into_linear(weight: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (in, before) and bias (in,) of the linear layer that makes x directly, so that it makes x/s."""
    return weight / s[:, None], None if bias is None else bias / s


def smooth(problem: Problem, config: SmoothQuant) -> tuple[Tensor, dict[str, float]]:
    """s (in,) of the stack alone, to be folded; notes: the largest magnitude over the median one, before and after."""
    x = problem.stats.absmax
    s = smooth_scale(x, problem.weight, config.alpha)
    peaks = [float(t.max() / t.median().clamp_min(1e-12)) for t in (x, x / s)]
    return s, {"activation_peak": peaks[0], "activation_peak_smooth": peaks[1]}


def smoothquant(problem: Problem, config: SmoothQuant) -> Solved:
    """Scale, then round to nearest."""
    grids(problem, "smoothquant")
    W, mask = start(problem)
    s = smooth_scale(problem.stats.absmax, W, config.alpha)
    params = problem.constraint.fit_all(W * s)
    codes = Codes.round(W * s, params, params.bits, problem.constraint.group_size)
    x = problem.stats.absmax
    typical = float(x.median().clamp_min(1e-12))
    smooth = x / s
    notes = {
        "activation_peak": float(x.max()) / typical,
        "activation_peak_smooth": float(smooth.max() / smooth.median().clamp_min(1e-12)),
    }
    return finish(problem, stored=Scaled(codes, 1 / s), mask=mask, notes=notes)
