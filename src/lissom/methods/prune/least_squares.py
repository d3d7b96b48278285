"""The best weights under masks that are already chosen: shared arithmetic of :mod:`.refit` and :mod:`.alps`.

    minimise ½ (ŵ − w) H (ŵ − w)ᵀ   over ŵ with support S     ⇔     H_SS ŵ_Sᵀ = (H wᵀ)_S

H is shared by all rows, the supports are not, so every row is a linear system of its own of size |S|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...core import NumericalError, Problem, Solved, damped, sweep

_CG_TYPICAL = 30  # products after which CG usually meets the default tolerance
_GATHER = 16  # a gathered, batched multiplication costs as much as this many in one large product (measured)
_BATCH_NUMBERS = 2**25  # numbers gathered at once by the exact solver: 128 MiB


@dataclass(frozen=True)
class Refit:
    """``solver``: ``cg``, ``exact``, or ``auto``, the cheaper one. ``tolerance``: of ‖residual‖/‖right side‖ by row, in
    the norm of diag(H)⁻¹. ``iterations``: of cg at most. ``damping``: fraction of mean(diag H) added.
    """

    solver: Literal["auto", "cg", "exact"] = "auto"
    tolerance: float = 1e-3
    iterations: int = 200
    damping: float = 0.01


def conjugate_gradients(
    H: Tensor, target: Tensor, mask: Tensor, start: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, int]:
    """Rows ŵ supported on ``mask`` with ``(ŵ H)_S = target_S``, (rows, in), and the iterations done.

    ``target: (rows, in)`` is W H. All rows go together, one product (rows, in)·(in, in) per iteration, preconditioned
    by diag H; a row that has met the tolerance rests, and when a quarter of them do, products go on without them. The error never rises above that of ``start``, whose values off
    the mask are ignored.
    """
    inverse_diagonal = mask / H.diagonal()  # zero off the support: r need not be masked
    x = torch.where(mask, start, 0.0)
    r = target - x @ H
    limit = (target.square() * inverse_diagonal).sum(1) * tolerance**2
    p = z = r * inverse_diagonal
    rz = (r * z).sum(1)
    done = 0
    active = rz > limit
    out, index = x, torch.arange(len(x))
    while done < iterations and bool(active.any()):
        q = p @ H
        curvature = (p * q).sum(1)
        # a row at rest (or a null direction in fp32) takes a step of zero
        alpha = torch.where(active & (curvature > 0), rz / curvature.clamp_min(1e-38), 0.0)[:, None]
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        z = r * inverse_diagonal
        new = (r * z).sum(1)
        p = torch.addcmul(z, (new / rz.clamp_min(1e-38))[:, None], p)
        rz = new
        active = active & (rz > limit)
        done += 1
        if int(active.count_nonzero()) < 0.75 * len(active):
            if x is not out:
                out[index] = x
            on = active.nonzero()[:, 0]
            index, x, r, p, inverse_diagonal = index[on], x[on], r[on], p[on], inverse_diagonal[on]
            rz, limit, active = rz[on], limit[on], active[on]
    if x is not out:
        out[index] = x
    return out, done


def exact_rows(H: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same rows by Cholesky. Rows of similar support size share a batch, padded by identity."""
    rows = len(mask)
    counts = mask.sum(1)
    order = counts.argsort(descending=True)
    # kept columns first, in their order
    position = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    out = torch.zeros_like(target)
    at = 0
    while at < rows:
        k = int(counts[order[at]])
        if k == 0:
            break
        chosen = order[at : at + max(1, _BATCH_NUMBERS // (k * k))]
        index = position[chosen, :k]
        pad = torch.arange(k) >= counts[chosen, None]
        A = H[index[:, :, None], index[:, None, :]]
        A.masked_fill_(pad[:, :, None] | pad[:, None, :], 0)
        A.diagonal(dim1=1, dim2=2).masked_fill_(pad, 1)
        b = target[chosen].gather(1, index).masked_fill_(pad, 0)
        L, info = torch.linalg.cholesky_ex(A)
        if bool(info.any()):
            raise NumericalError(
                f"{int((info > 0).sum())} rows' normal equations are not positive definite: raise `damping` "
                "of the pruning step, or use more calibration text"
            )
        x = torch.cholesky_solve(b[:, :, None], L)[:, :, 0].masked_fill_(pad, 0)
        out[chosen] = out[chosen].scatter(1, index, x)
        at += len(chosen)
    return torch.where(mask, out, 0.0)


def on_support(problem: Problem, mask: Tensor, start: Tensor, config: Refit) -> Solved:
    """Refit under ``mask`` from ``start``, then, where there is a grid, round with error feedback on that mask.

    Rows that lose nothing keep the dense weights bit for bit; weights of inputs that never fire become zero.
    """
    H, dead = damped(problem.stats.hessian, config.damping)
    dense = torch.where(dead, 0.0, problem.weight)
    whole = (mask | dead).all(1)
    weight, done = dense, 0
    if not bool(whole.all()):
        target = dense @ H
        size, cost = mask.sum(1).double(), float(_CG_TYPICAL * mask.numel() * mask.shape[1])
        if config.solver == "exact" or (config.solver == "auto" and _GATHER * float(size.pow(3).sum()) / 3 < cost):
            weight = exact_rows(H, target, mask)
        else:
            weight, done = conjugate_gradients(H, target, mask, start, config.tolerance, config.iterations)
        weight = torch.where(whole[:, None], dense, weight)
    weight = torch.where(mask, weight, 0.0)
    notes = {"refit_iterations": float(done)}
    codes = None
    if problem.constraint.quantized:
        frozen = replace(problem, constraint=problem.constraint.freeze(mask), start=None)
        solved = sweep(frozen, problem.factor(config.damping), target=weight)
        weight, codes = solved.weight, solved.codes
    return Solved(weight, codes, mask, problem.error(weight, config.damping), notes)
