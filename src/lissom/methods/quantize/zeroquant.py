"""ZeroQuant: group-wise weights, token-wise dynamic activations, and layer-by-layer distillation (LKD).

    y = x̂ Ŵᵀ       x̂: 8 bits, one scale per token, found at run time;  Ŵ: one scale per group of a row
    LKD: for layer k, minimise ‖L_k(h) − L̂_k(h)‖² with h from the quantized layers before it; no labels

Weights are rounded by ``rtn`` with a group size (8 bits for attention, 4 for feed-forward in the paper: two steps with
``only``); :func:`zeroquant` is LKD of a whole block after that, on grids that follow the weights. A layer is any function of
its weights and its input, so :func:`distil_layer` serves a single linear as well. Source: Yao et al., NeurIPS 2022
(arXiv 2206.01861), eq. 3–5; methods/02 §18. Differs: the target is the dense block's output for the dense model's input, so that what
the blocks before lost is made good too; training starts from the rounded weights, and the best pass is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import BlockProblem, Codes, Grid, Solved
from ...core.grid import spread_groups
from .activations import ActivationGrid, fake_activation
from .common import Adam

Layer = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class ZeroQuant:
    """LKD: ``steps`` of Adam with rate ``lr`` over the samples in turn."""

    steps: int = 100
    lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0:
            raise ValueError(f"steps must not be negative and lr must be positive, not {self.steps} and {self.lr:g}")


def token_wise_linear(x: Tensor, codes: Codes, bias: Tensor | None = None, bits: int = 8) -> Tensor:
    """Simulated: ``x (…, in)`` rounded by token, weights decoded from codes."""
    return torch.nn.functional.linear(fake_activation(x, ActivationGrid(bits=bits)), codes.decode(), bias)


def fake_weight(W: Tensor, grid: Grid) -> Tensor:
    """Round to nearest with the gradient passed straight through; (out, in)."""
    with torch.no_grad():
        params = grid.fit_all(W)
        group = min(grid.group_size or W.shape[1], W.shape[1])
        rounded = Codes.round(W, params, grid.bits, group).decode()
        scale, zero, levels = (spread_groups(t, W.shape[1], group) for t in (params.scale, params.zero, params.levels))
        inside = (W >= -zero * scale) & (W <= (levels - 1 - zero) * scale)
    return torch.where(inside, W + (rounded - W).detach(), rounded)


@torch.enable_grad()
def distil_layer(
    layer: Layer,
    weights: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    config: ZeroQuant,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], float, float]:
    """LKD of one layer.

    ``grids`` names the quantized weights; ``masks`` (bool, shape of the weight) those whose zeros stay; ``inputs`` come from the quantized prefix, ``targets`` from the teacher's layer.
    Returns the trained float weights of the best pass (round them with the same grids) and the mean squared error
    before and after.
    """
    masks = masks or {}
    trained = {name: w.clone().requires_grad_(name in grids) for name, w in weights.items()}
    moving = [w for w in trained.values() if w.requires_grad]
    optimizer = Adam(moving, config.lr)

    def rounded() -> dict[str, Tensor]:
        kept = {n: w * masks[n] if n in masks else w for n, w in trained.items()}
        return {n: fake_weight(w, grids[n]) if n in grids else w for n, w in kept.items()}

    def error() -> float:
        with torch.no_grad():
            now = rounded()
            losses = [torch.nn.functional.mse_loss(layer(now, x), y) for x, y in zip(inputs, targets, strict=True)]
            return float(torch.stack(losses).mean())

    before = least = error()
    best = {n: w.detach().clone() for n, w in trained.items()}
    for i in range(config.steps):
        k = i % len(inputs)
        torch.nn.functional.mse_loss(layer(rounded(), inputs[k]), targets[k]).backward()
        optimizer.step()
        if k == len(inputs) - 1 or i == config.steps - 1:
            now = error()
            if now < least:
                least, best = now, {n: w.detach().clone() for n, w in trained.items()}
    return best, before, least


def zeroquant(problem: BlockProblem, config: ZeroQuant) -> dict[str, Solved]:
    """LKD of one block: new codes on grids re-fitted to the trained weights; layers without integer codes stay as they are."""
    solved = dict(problem.solved)
    codes = {n: s.codes for n, s in solved.items() if s.codes is not None and s.stored is None}
    if not codes or config.steps == 0:
        return solved
    grids = {n: Grid(c.bits, c.group_size, c.symmetric) for n, c in codes.items()}
    masks = {n: m for n in codes if (m := solved[n].mask) is not None}
    inputs, targets = ([row for batch in t for row in batch.split(1)] for t in (problem.inputs, problem.targets))
    weights = {n: s.weight for n, s in solved.items()}
    best, before, after = distil_layer(problem.forward, weights, grids, inputs, targets, config, masks)
    notes = {"block_error_before": before, "block_error_after": after}
    for name, grid in grids.items():
        old = solved[name]
        if after < before:
            w = best[name] * masks[name] if name in masks else best[name]
            made = Codes.round(w, grid.fit_all(w), grid.bits, grid.group_size)
            old = replace(old, weight=made.decode(), codes=made, error=torch.full_like(old.error, torch.nan))
        solved[name] = replace(old, notes={**old.notes, **notes})
    return solved
