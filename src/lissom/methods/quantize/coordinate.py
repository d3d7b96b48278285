"""Coordinate descent on codes and least squares on scales, for the error tr(Δ H Δᵀ) of a layer.

Both keep everything else fixed and never raise the error. W: (out, in), H: (in, in) damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import GridParams
from ...core.grid import spread_groups
from .common import half

_BLOCK = 128


def descend(W: Tensor, H: Tensor, code: Tensor, params: GridParams, mask: Tensor | None) -> Tensor:
    """One pass over the columns; ``code`` (out, in) float, ``params`` spread to (out, in). Returns new codes."""
    columns = W.shape[1]
    code = code.clone()
    delta = params.decode(code) - W
    d = H.diagonal()
    for at in range(0, columns, _BLOCK):
        stop = min(at + _BLOCK, columns)
        here = slice(at, stop)
        slope = (delta @ H[:, here]).T.contiguous()  # Δ H of the block's columns, (span, out), as all that follows
        h = H[here, here]
        w, c, s, z, top = (t[:, here].T.contiguous() for t in (W, code, params.scale, params.zero, params.levels - 1))
        keep = None if mask is None else mask[:, here].T.contiguous()
        old = (c - z) * s
        for i in range(stop - at):
            new = torch.minimum(torch.round((old[i] - slope[i] / d[at + i]) / s[i] + z[i]), top[i]).clamp_min(0)
            if keep is not None:
                new = torch.where(keep[i], new, z[i])
            slope[i + 1 :].addr_(h[i, i + 1 :], (new - z[i]) * s[i] - old[i])
            c[i] = new
        code[:, here] = c.T
        delta[:, here] = ((c - z) * s - w).T
    return code


def refit(W: Tensor, H: Tensor, code: Tensor, params: GridParams, group: int) -> Tensor:
    """Scales (out, groups) with the least tr(Δ H Δᵀ) for given codes, fp16-exact; rows that would lose keep theirs."""
    rows, columns = W.shape
    A = code - spread_groups(params.zero, columns, group)
    count = params.scale.shape[1]
    M = torch.zeros(rows, count, count, dtype=torch.float64)
    for g in range(count):
        at, stop = g * group, min((g + 1) * group, columns)
        product = (A[:, at:stop] @ H[at:stop]) * A
        M[:, g] = _by_group(product, group, count).double()
    target = _by_group((W @ H) * A, group, count).double()
    ridge = 1e-6 * M.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30
    s = torch.linalg.solve(M + ridge * torch.eye(count, dtype=M.dtype), target[..., None])[..., 0]
    new = half(s.float())
    new = torch.where((new > 0) & torch.isfinite(new), new, params.scale)

    def error(scale: Tensor) -> Tensor:
        t = scale.double()
        return ((t[:, None] @ M @ t[..., None])[:, 0, 0]) - 2 * (t * target).sum(1)

    return torch.where((error(new) < error(params.scale))[:, None], new, params.scale)


def _by_group(x: Tensor, group: int, count: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, count * group - x.shape[1]))
    return padded.reshape(len(x), count, group).sum(2)
