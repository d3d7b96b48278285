"""SpQR: tiny groups with quantized scales, and the few weights that rounding would hurt most kept in half precision.

    threshold   τ · mean_c(Var(W[:, c]) / U_cc²),     H⁻¹ = UᵀU
    before      w_k of a group is an outlier when fitting the group's grid without it lowers the group's
                Σ e²/U_cc² by more than the threshold (its own error not counted)
    scales      of every 16 neighbouring groups are ``meta_bits``-bit integers; zero points too
    sweep       GPTQ; a weight whose realised e²/U_cc² exceeds the threshold becomes an outlier as well

W: (out, in). Stored: ``Patched(TwoLevel)``: b + 2·(meta_bits + 32/16)/group + 32·(outlier rate) bits per weight. The
paper counts its second level over 16 rows of one group; here it is over 16 groups of one row. τ = ∞ is GPTQ on that grid.
The constraint's group size applies; 16 is the paper's. A mask's zeros are stored beside (zero is not always a level).
Source: Dettmers et al. 2023 (arXiv 2306.03078), algorithm 1; methods/02 §20. Differs: grids are fitted on the original
weights (static groups), so that ``act_order`` keeps groups contiguous; damping 0.01 where the repository uses 1.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import Masked, Patched, Problem, Second, Solved, Stored, TwoLevel
from ...core.grid import spread_groups
from .common import feedback, finish, grids, half, layers, restack, start


@dataclass(frozen=True)
class SpQR:
    """``tau`` of the threshold (inf: no outliers); ``meta_bits``, ``meta_group`` of scales and zeros."""

    tau: float = 0.2
    meta_bits: int = 3
    meta_group: int = 16
    act_order: bool = True
    damping: float = 0.01


def second_level(t: Tensor, bits: int, group: int) -> Second:
    """``t: (out, groups)`` as integers, min-max in every ``group`` neighbours of a row."""
    columns = t.shape[1]
    count = math.ceil(columns / group)
    padded = torch.nn.functional.pad(t[:, None], (0, count * group - columns), mode="replicate")[:, 0]
    view = padded.reshape(len(t), count, group)
    low, high = view.amin(2), view.amax(2)
    step, base = half((high - low) / (2**bits - 1)), half(low)
    step = torch.where(step > 0, step, torch.ones_like(step))
    wide = [spread_groups(x, columns, group) for x in (step, base)]
    codes = torch.round((t - wide[1]) / wide[0]).clamp(0, 2**bits - 1).to(torch.uint8)
    return Second(codes, step, base, bits, group)


def without_each(w: Tensor, importance: Tensor, bits: int) -> Tensor:
    """How much a group's weighted error falls when one weight is taken out of it, (groups, n), for ``w: (groups, n)``.

    ``importance`` (n,) or (groups, n) weighs squared errors; the grid is fitted to the others.
    """
    groups, n = w.shape
    importance = importance.expand(groups, n)
    top = 2.0**bits - 1

    def errors(low: Tensor, high: Tensor, x: Tensor) -> Tensor:
        scale = ((high - low) / top).clamp_min(1e-12)
        zero = torch.round(-low / scale)
        return ((torch.round(x / scale) + zero).clamp(0, top) - zero) * scale - x

    base = (errors(w.amin(1, keepdim=True), w.amax(1, keepdim=True), w).square() * importance).sum(1, keepdim=True)
    if n < 2:
        return torch.zeros_like(w)
    smallest, largest = w.topk(2, 1, largest=False), w.topk(2, 1)
    at = torch.arange(n)
    low = torch.where(at == smallest.indices[:, :1], smallest.values[:, 1:], smallest.values[:, :1])
    high = torch.where(at == largest.indices[:, :1], largest.values[:, 1:], largest.values[:, :1])
    rest = errors(low[..., None], high[..., None], w[:, None]).square() * importance[:, None]  # (groups, left out, n)
    return base - (rest.sum(2) - rest.diagonal(dim1=1, dim2=2))


def _grid(W: Tensor, outlier: Tensor, bits: int, group: int, config: SpQR) -> tuple[Second, Second]:
    lows, highs = [], []
    for w, out in zip(W.split(group, 1), outlier.split(group, 1), strict=True):
        kept = torch.where(out, w.new_tensor(torch.inf), w), torch.where(out, w.new_tensor(-torch.inf), w)
        none = out.all(1)
        lows.append(torch.where(none, w.amin(1), kept[0].amin(1)))
        highs.append(torch.where(none, w.amax(1), kept[1].amax(1)))
    low, high = torch.stack(lows, 1), torch.stack(highs, 1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    scale = second_level(scale, config.meta_bits, config.meta_group)
    # beside wide groups a narrow one may get step 0, which no zero point can make up for: the smallest step instead
    scale = replace(scale, codes=torch.where(scale.decode() > 0, scale.codes, scale.codes.clamp_min(1)))
    step = scale.decode().clamp_min(1e-8)  # a scale code of 0 may decode to the smallest scale, never below
    return scale, second_level(-low / step, config.meta_bits, config.meta_group)


def spqr(problem: Problem, config: SpQR) -> Solved:
    """Every layer of the stack; the factorisation is shared."""
    factor = problem.factor(config.damping, config.act_order)
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "spqr"), strict=True):
        W, mask = start(layer)
        columns = W.shape[1]
        group = min(grid.group_size or columns, columns)
        order = torch.arange(columns) if factor.order is None else factor.order
        d = torch.empty(columns)
        d[order] = factor.diagonal
        cost = 1 / d.square()
        threshold = config.tau * float((W.var(0, correction=0) * cost).mean())
        outlier = torch.zeros_like(W, dtype=torch.bool)
        if math.isfinite(config.tau):
            for at in range(0, columns, group):
                span = slice(at, min(at + group, columns))
                gain = [
                    without_each(rows, cost[span], grid.bits)
                    for rows in W[:, span].split(max(1, (1 << 22) // group**2))
                ]
                outlier[:, span] = torch.cat(gain) > threshold
        if mask is not None:
            outlier &= mask
        scales, zeros = _grid(W, outlier, grid.bits, group, config)
        scale, zero = (spread_groups(t.decode(), columns, group) for t in (scales, zeros))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        values = torch.zeros_like(W)
        replaced = W.clone()
        top = 2.0**grid.bits - 1

        def choose(
            i: int, w: Tensor, order=order, scale=scale, zero=zero, values=values, replaced=replaced,
            outlier=outlier, mask=mask, top=top, cost=cost, threshold=threshold,
        ) -> Tensor:  # fmt: skip
            j = int(order[i])
            code = torch.round(w / scale[:, j] + zero[:, j]).clamp(0, top)
            q = (code - zero[:, j]) * scale[:, j]
            if math.isfinite(threshold):
                outlier[:, j] |= (w - q).square() * cost[j] > threshold
            if mask is not None:
                outlier[:, j] &= mask[:, j]
            values[:, j], replaced[:, j] = code, half(w)
            q = torch.where(outlier[:, j], half(w), q)
            return q if mask is None else q * mask[:, j]

        feedback(W[:, order], factor.U, choose)
        base = TwoLevel(values.to(torch.uint8), scales, zeros, grid.bits, group)
        form: Stored = Patched.where(base, outlier, replaced)
        if mask is not None:
            form = Masked(form, mask)
        notes = {"outliers": float(outlier.float().mean())}
        out.append(finish(layer, stored=form, mask=mask, notes=notes, damping=config.damping))
    return restack(problem, out)
