"""Error feedback over inputs and outputs: rounding under a Hessian that is a Kronecker product (arXiv 2505.22988, §3).

    minimise   tr(G E A Eᵀ),   E = W − Q,   A = U D Uᵀ (in, in),   G = V C Vᵀ (out, out),   U, V with ones on the diagonal

is ‖C^½ (Vᵀ E U) D^½‖²: entry (i, j) of Vᵀ E U is E_ij plus what the entries with k ≤ i and l ≤ j have left. Taken
column by column and down each column, every entry sees those, and is rounded so that its own sum is least. With G = I this is
the sweep of :mod:`.sweep` on a grid.

:func:`decide_entries` is the definition of the innermost loop, in torch; the pipeline gives the compiled one (:attr:`.Problem.entry_loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .factor import Side
from .grid import GridParams

_BLOCK = 128


@dataclass(frozen=True)
class Entries:
    """A block of columns, transposed: a column of W is a row here.

    ``w: (span, rows)`` the weights to approximate; ``left: (span, rows)`` what earlier blocks left of their errors, summed with U (the
    loop adds to it); ``u: (span, span)``, ``v: (rows, rows)`` the factors; ``keep: (span, rows)`` bool, None: all; ``params`` (span, rows)
    each. Written: ``codes`` (span, rows) uint8 and ``errors`` (span, rows).
    """

    w: Tensor
    left: Tensor
    u: Tensor
    v: Tensor
    keep: Tensor | None
    params: GridParams
    codes: Tensor
    errors: Tensor


EntryLoop = Callable[[Entries], None]


def decide_entries(block: Entries) -> None:
    """Round all entries of a block in order."""
    p = block.params
    for j, w in enumerate(block.w):
        left, above = block.left[j], torch.zeros_like(w)
        for i in range(len(w)):
            grid = GridParams(p.scale[j, i], p.zero[j, i], p.levels[j, i])
            code = grid.round(w[i] + left[i] + above[i])
            if block.keep is not None and not block.keep[j, i]:
                code = grid.zero
            block.codes[j, i] = code.to(torch.uint8)
            block.errors[j, i] = w[i] - grid.decode(code)
            above[i + 1 :].add_(block.v[i, i + 1 :] * (block.errors[j, i] + left[i]))
        block.left[j + 1 :].addr_(block.u[j, j + 1 :], block.errors[j])


def two_sided(
    W: Tensor,
    inputs: Side,
    outputs: Side,
    params: GridParams,
    group: int,
    keep: Tensor | None = None,
    loop: EntryLoop = decide_entries,
) -> Tensor:
    """Codes (out, in) uint8 of ``W: (out, in)`` on fixed grids, ``params: (out, groups)``; what ``keep`` drops gets the code of zero."""

    def turned(t: Tensor) -> Tensor:
        return t[outputs.order][:, inputs.order].T.contiguous()

    def widened(t: Tensor) -> Tensor:
        return t[outputs.order][:, inputs.order // group].T.contiguous()

    w, kept = turned(W), None if keep is None else turned(keep)
    scale, zero, levels = map(widened, (params.scale, params.zero, params.levels.expand_as(params.scale)))
    errors, codes = torch.empty_like(w), torch.empty_like(w, dtype=torch.uint8)
    for a in range(0, len(w), _BLOCK):
        here = slice(a, min(a + _BLOCK, len(w)))
        left = inputs.U[:a, here].T @ errors[:a]
        here_keep = None if kept is None else kept[here]
        grid = GridParams(scale[here], zero[here], levels[here])
        loop(
            Entries(
                w[here], left, inputs.U[here, here].contiguous(), outputs.U, here_keep, grid, codes[here], errors[here]
            )
        )
    out = torch.empty_like(codes.T)
    out[outputs.order[:, None], inputs.order] = codes.T
    return out
