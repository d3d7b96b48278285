"""YAQA: rounding with error feedback from all inputs and all outputs of a layer, under the curvature of the whole model's loss.

    minimise   tr(G Δ A Δᵀ),   Δ = Q − W        A = E[x xᵀ] (in, in), of the inputs;   G = E[g gᵀ] (out, out), of the gradients at the outputs

GPTQ's feedback moves what one input rounds away to the row's other inputs; here it moves to the other outputs as well, so that what
reaches the loss is least. Grids are fitted first and stay, columns and rows go by falling diagonals. With G = I this is GPTQ with
activation order.

A model without a head has no loss: its outputs count alike. Source: Tseng, Sun, De Sa 2025 (arXiv 2505.22988), eq. for the two-sided
LDLQ in §3; from memory of the paper. Differs: G is the empirical Fisher of the next token on the calibration text in place of a power
iteration on the KL, within blocks of 2048 outputs; no rotations and no trellis codes; G is damped by its whole mean diagonal (chosen on held-out text).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import Codes, Problem, Solved, damped, side, two_sided
from .common import finish, grids, start
from .coordinate import refit

_ALIKE = 64  # outputs that are rounded together where they do not know of each other


@dataclass(frozen=True)
class YAQA:
    """``damping`` of A and ``damping_out`` of G, fractions of their mean diagonals; ``sweeps``: before each but the first, scales are
    fitted to the codes by least squares."""

    damping: float = 0.01
    damping_out: float = 1.0
    sweeps: int = 3


def yaqa(problem: Problem, config: YAQA) -> Solved:
    """Two-sided sweeps of each layer of the stack; ``extras["output_blocks"]`` is G, or absent."""
    grids(problem, "yaqa")
    W, mask = start(problem)
    W = torch.where(problem.stats.sumsq == 0, 0.0, W)
    params, group = problem.constraint.fit_all(W), min(problem.constraint.group_size or W.shape[1], W.shape[1])
    inputs, G = side(problem.stats.hessian, config.damping), problem.extras.get("output_blocks")
    block = _ALIKE if G is None else G.shape[1]
    places = [
        slice(at, min(at + block, rows.stop))
        for rows, _ in problem.constraint.slices()
        for at in range(rows.start, rows.stop, block)
    ]
    sides = [
        side(torch.eye(r.stop - r.start).to(W) if G is None else G[r, : r.stop - r.start], config.damping_out)
        for r in places
    ]
    H, _ = damped(problem.stats.hessian, config.damping)
    codes: Tensor | None = None
    for _ in range(max(1, config.sweeps)):
        if codes is not None:
            params = replace(params, scale=refit(W, H, codes.float(), params, group))
        codes = torch.cat(
            [
                two_sided(W[r], inputs, s, params.rows(r), group, None if mask is None else mask[r], problem.entry_loop)
                for r, s in zip(places, sides, strict=True)
            ]
        )
    assert codes is not None
    return finish(
        problem, Codes(codes, params.scale, params.zero, params.bits, group), mask=mask, damping=config.damping
    )
