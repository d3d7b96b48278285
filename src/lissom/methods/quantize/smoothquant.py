"""SmoothQuant: divide outlier inputs by s and multiply their weights, so that both quantize well to 8 bits.

    s_j = max|X_j|^α / max_r|W_rj|^(1−α),     x ← x/s,   W ← W · diag(s)

W: (out, in), s: (in,), shared by the layers of a stack. The function is unchanged; 1/s folds into the norm or linear
that makes x (:func:`fold_into_norm`, :func:`fold_into_linear`). The solver rounds W·s to the constraint's grid and
stores ``Scaled(Codes)``; ``fake_activation`` of x/s is the other half of W8A8.
α ½ for OPT and BLOOM, .75–.85 for LLaMA. Source: Xiao et al., ICML 2023 (arXiv 2211.10438), eq. 4; methods/02 §16.

``statistic: rms`` (ours) has √E[x_j²] in place of max|X_j|: a few tokens of a text, its first above all, have magnitudes that no
other token comes near, and scales by token keep what they are from disturbing the others (numbers in benchmarks/RESULTS.md).

``alpha: search`` (ours) takes for every input the α, among none and steps of 0.05, with the least

    mean over tokens  ‖ Q_a(x/s) Q_w(W s)ᵀ − x Wᵀ ‖² / ‖ x Wᵀ ‖²,     Q_a by token, Q_w the constraint's grid

on the tokens in ``Problem.extras["sample"]`` (tokens, in). ``extras["owner"]`` (in,): inputs with equal numbers share a factor, as query heads do
that read one value head; their geometric mean is taken before the error is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import Codes, Problem, RecipeError, Scaled, Solved, Stats
from .activations import round_input
from .common import finish, grids, half, start

_ALPHAS = tuple(i / 20 for i in range(2, 20))
_ROWS = 1024  # of the weights, for the search


@dataclass(frozen=True)
class SmoothQuant:
    """``alpha``: 0 leaves activations alone, 1 moves all of their range to the weights; search: see the module (as a fold, without
    bits, only), for activations of ``bits_of_inputs``. ``statistic`` of an input: absmax|rms."""

    alpha: float | Literal["search"] = 0.5
    statistic: Literal["absmax", "rms"] = "absmax"
    bits_of_inputs: int = 8

    def __post_init__(self) -> None:
        if self.alpha != "search" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha must be in [0, 1] or 'search', not {self.alpha}")
        if not 2 <= self.bits_of_inputs <= 8:
            raise ValueError(f"bits_of_inputs must be 2 … 8, not {self.bits_of_inputs}")


def smooth_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (in,), fp16-exact, for ``activation: (in,)`` = max|X_j| or √E[x_j²] and ``weight: (out, in)``; 1 where either is all zero."""
    w = weight.abs().amax(0)
    s = half((activation.pow(alpha) / w.clamp_min(1e-12).pow(1 - alpha)).clamp(1e-4, 1e4))
    return torch.where((activation > 0) & (w > 0), s, torch.ones_like(s))


def statistic_of(stats: Stats, which: str) -> Tensor:
    """(in,)"""
    return stats.absmax if which == "absmax" else (stats.sumsq / max(stats.count, 1)).sqrt()


def fold_into_norm(gain: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gain and bias (in,) of the norm that makes x, so that it makes x/s."""
    return gain / s, None if bias is None else bias / s


def fold_into_linear(weight: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight (in, before) and bias (in,) of the linear layer that makes x directly, so that it makes x/s."""
    return weight / s[:, None], None if bias is None else bias / s


def smooth(problem: Problem, config: SmoothQuant) -> tuple[Tensor, dict[str, float]]:
    """s (in,) of the stack alone, to be folded; notes: the largest magnitude over the median one, before and after."""
    x = problem.stats.absmax
    notes: dict[str, float] = {}
    if config.alpha == "search":
        s, notes = searched(problem, config.bits_of_inputs, config.statistic)
    else:
        wide = statistic_of(problem.stats, config.statistic)
        s = _shared(smooth_scale(wide, problem.weight, float(config.alpha)), problem.extras.get("owner"))
    peaks = [float(t.max() / t.median().clamp_min(1e-12)) for t in (x, x / s)]
    return s, notes | {"activation_peak": peaks[0], "activation_peak_smooth": peaks[1]}


def searched(problem: Problem, bits: int, statistic: str = "absmax") -> tuple[Tensor, dict[str, float]]:
    """The best s (in,) of all α; notes: α (0: no factor), and the error without a factor and with this one."""
    x, W = problem.extras["sample"], problem.weight
    step = -(-len(W) // _ROWS)
    constraint = problem.constraint.slices()[0][1]  # layers of one stage are rounded alike
    wide = statistic_of(problem.stats, statistic)
    y = x @ W[::step].T
    scale = y.square().sum(-1).clamp_min(1e-30)

    def error(s: Tensor) -> float:
        weight = W[::step] * s
        weight = weight if constraint.grid is None else constraint.grid.project(weight)
        return float(((round_input(x / s, bits) @ weight.T - y).square().sum(-1) / scale).mean())

    best, chosen = torch.ones_like(wide), 0.0
    first = least = error(best)
    for alpha in _ALPHAS:
        s = _shared(smooth_scale(wide, W, alpha), problem.extras.get("owner"))
        now = error(s)
        if now < least:
            best, chosen, least = s, alpha, now
    return best, {"alpha": chosen, "error_unsmoothed": first, "error": least}


def _shared(s: Tensor, owner: Tensor | None) -> Tensor:
    """``s`` with the geometric mean wherever inputs have one owner."""
    if owner is None:
        return s
    logs = torch.zeros(int(owner.max()) + 1).index_add_(0, owner, s.log())
    return half((logs / torch.bincount(owner).clamp_min(1)).exp()[owner])


def smoothquant(problem: Problem, config: SmoothQuant) -> Solved:
    """Scale, then round to nearest."""
    grids(problem, "smoothquant")
    if config.alpha == "search":
        raise RecipeError(
            "smoothquant: `alpha: search` is for the fold; leave its bits out and put a quantization step after it"
        )
    W, mask = start(problem)
    s = smooth_scale(statistic_of(problem.stats, config.statistic), W, float(config.alpha))
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
