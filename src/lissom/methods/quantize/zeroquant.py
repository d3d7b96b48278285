"""ZeroQuant: group-wise weights, token-wise dynamic activations, and layer-by-layer distillation (LKD).

    y = x̂ Ŵᵀ       x̂: 8 bits, one scale per token, found at run time;  Ŵ: one scale per group of a row
    LKD: for layer k, minimise ‖L_k(h) − L̂_k(h)‖² with h from the quantized layers before it; no labels

Weights are rounded by ``rtn`` with a group size (8 bits for attention, 4 for feed-forward in the paper: two steps with
``only``); this file holds the other two pieces. A layer is any function of its weights and its input, so LKD serves a
single linear and a whole block alike. Source: Yao et al., NeurIPS 2022 (arXiv 2206.01861), eq. 3–5; methods/02 §18.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Codes, Grid
from ...core.grid import spread_groups
from .activations import ActivationGrid, fake_activation
from .common import Adam

Layer = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class ZeroQuant:
    """LKD: ``steps`` of Adam with rate ``lr`` over the batches in turn."""

    steps: int = 100
    lr: float = 1e-4


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
) -> tuple[dict[str, Tensor], float, float]:
    """LKD of one layer.

    ``grids`` names the quantized weights; ``inputs`` come from the quantized prefix, ``targets`` from the teacher's layer.
    Returns the trained float weights of the best pass (round them with the same grids) and the mean squared error
    before and after.
    """
    trained = {name: w.clone().requires_grad_(name in grids) for name, w in weights.items()}
    moving = [w for w in trained.values() if w.requires_grad]
    optimizer = Adam(moving, config.lr)

    def rounded() -> dict[str, Tensor]:
        return {n: fake_weight(w, grids[n]) if n in grids else w for n, w in trained.items()}

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
