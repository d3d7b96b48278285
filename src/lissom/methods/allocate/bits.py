"""Bits per layer from loss-per-bit curves: every layer gets the bits at which one more would save least.

    minimise Σ_l loss_l(b_l)   subject to   Σ n_l b_l ≤ target · Σ n_l,   b_l ∈ {2, 3, 4, 8}
    loss_l(b) = Σ_rows ½ δ_b H δ_bᵀ / (½ tr W H Wᵀ) · w_l

H is the Hessian of the layer's outputs, δ_b the error of rounding to b bits (``estimate`` rtn) or of one GPTQ sweep
(``gptq``). ``weight``: layer (w = 1: every layer's relative error counts alike) or size (w = n_l). The integer programme
is solved by its Lagrangian on the convex hulls of the curves (:mod:`.spend`).
Q-BERT (Shen et al., AAAI 2020, arXiv 1909.05840) ranks layers by the top Hessian eigenvalue of the task loss and gives two
widths; here the trace form of HAWQ-V2 (1911.03852) with the layer's own H, which needs no labels, and any widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...core import Both, Budget, Grid, LayerSummary, Problem, RecipeError, Stack, sweep
from .spend import Option, spend


@dataclass(frozen=True)
class Bits:
    """``choices`` of bits; ``group_size`` (0: rows), ``estimate``, ``weight``: see the module; ``damping`` of H."""

    choices: tuple[int, ...] = (2, 3, 4, 8)
    group_size: int = 128
    estimate: Literal["rtn", "gptq"] = "gptq"
    weight: Literal["layer", "size"] = "layer"
    damping: float = 0.01


def summarise(problems: Sequence[Problem], target: float, config: Bits) -> list[dict[str, float]]:
    """``loss_b`` for each choice b, relative to the energy of the layer's outputs, for every layer of every stack."""
    out = []
    for problem in problems:
        energy = problem.energy()
        curves: list[dict[str, float]] = [{} for _ in problem.names]
        for bits in config.choices:
            grid = Grid(bits, config.group_size or None)
            stack = Stack(tuple((rows, Both(None, grid)) for rows, _ in problem.constraint.parts))
            trial = replace(problem, constraint=stack, start=None)
            if config.estimate == "gptq":
                error = sweep(trial, problem.factor(config.damping)).error
            else:
                error = trial.project(problem.weight.abs()).error
            for curve, (rows, _) in zip(curves, stack.slices(), strict=True):
                curve[f"loss_{bits}"] = float(error[rows].sum()) / max(float(energy[rows].sum()), 1e-30)
        out += curves
    return out


def bits(layers: Sequence[LayerSummary], target: float, config: Bits) -> Budget:
    """Bits by layer, of mean at most ``target`` and as close to it as the layers' sizes allow."""
    low, high = min(config.choices), max(config.choices)
    if not low <= target <= high:
        raise RecipeError(f"`bits` allocation: a mean of {target:g} bits is not within its choices {low} … {high}")
    options = {}
    for layer in layers:
        w = layer.size if config.weight == "size" else 1
        options[layer.name] = [Option(layer.size * b, w * layer.values[f"loss_{b}"], bits=b) for b in config.choices]
    chosen = spend(options, target * sum(layer.size for layer in layers))
    return Budget("bits", {name: float(option.bits) for name, option in chosen.items()})
