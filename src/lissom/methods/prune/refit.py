"""Refit: the best weights under a mask that is already chosen, row by row.

    minimise ½ (ŵ − w) H (ŵ − w)ᵀ   over ŵ with support S     ⇔     H_SS ŵ_Sᵀ = (H wᵀ)_S

H is shared by all rows, the supports are not, so every row is a linear system of its own of size |S|. Two ways:

    cg      conjugate gradients on all rows at once: one product (out, in)·(in, in) per iteration, preconditioned by
            diag H, each row with its own step; stops when the residual of every row is below ``tolerance``
    exact   the systems are gathered and factorised in batches by Cholesky; costs Σ |S|³/3

``auto`` takes ``exact`` when its count of multiplications is below that of ``_CG_TYPICAL`` products. Any score can stand
before it ("prune with Wanda, refit"); it never raises the error. ALPS ends with ten such CG steps (arXiv 2406.07831,
§3.3); the exact form is the layer-wise optimum that all error-feedback solvers approximate. With a grid in the constraint
the refitted weights are rounded with error feedback on the frozen mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...core import NumericalError, Problem, Solved, damped, sweep

_CG_TYPICAL = 30  # products after which CG usually meets the default tolerance
_BATCH_NUMBERS = 2**25  # numbers gathered at once by the exact solver: 128 MiB


@dataclass(frozen=True)
class Refit:
    """``solver``: see the module. ``tolerance``: of ‖residual‖/‖right side‖ by row, in the norm of diag(H)⁻¹.
    ``iterations``: at most. ``damping``: fraction of mean(diag H) added.
    """

    solver: Literal["auto", "cg", "exact"] = "auto"
    tolerance: float = 1e-4
    iterations: int = 200
    damping: float = 0.01


def conjugate_gradients(
    H: Tensor, target: Tensor, mask: Tensor, start: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, int]:
    """Rows ŵ supported on ``mask`` with ``(ŵ H)_S = (target)_S``, (rows, in), and the iterations done.

    ``target: (rows, in)`` is W H. The error never rises above that of ``start``, whose values off the mask are ignored.
    """
    inverse_diagonal = 1 / H.diagonal()
    x = start * mask
    r = (target - x @ H) * mask
    limit = ((target * mask).square() * inverse_diagonal).sum(1) * tolerance**2
    z = r * inverse_diagonal
    p = z
    rz = (r * z).sum(1)
    done = 0
    active = rz > limit
    while done < iterations and bool(active.any()):
        q = (p @ H) * mask
        curvature = (p * q).sum(1)
        # a row at rest (or a null direction in fp32) takes a step of zero
        alpha = torch.where(active & (curvature > 0), rz / curvature.clamp_min(1e-38), 0.0)[:, None]
        x = x + alpha * p
        r = r - alpha * q
        z = r * inverse_diagonal
        new = (r * z).sum(1)
        p = z + (new / rz.clamp_min(1e-38))[:, None] * p
        rz = new
        active = active & (rz > limit)
        done += 1
    return x, done


def exact_rows(H: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same rows by Cholesky. Rows of similar support size share a batch, padded by identity."""
    rows, columns = mask.shape
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
                "of refit, or use more calibration text"
            )
        x = torch.cholesky_solve(b[:, :, None], L)[:, :, 0].masked_fill_(pad, 0)
        out[chosen] = out[chosen].scatter(1, index, x)
        at += len(chosen)
    return out * mask


def least_squares(problem: Problem, mask: Tensor, start: Tensor, config: Refit) -> tuple[Tensor, dict[str, float]]:
    """The refitted weights of ``problem`` under ``mask`` and notes for the report."""
    H, dead = damped(problem.stats.hessian, config.damping)
    target = problem.weight @ H
    if bool(dead.any()):  # inputs that never fire: their weights are zero in every solver
        target = target * ~dead
    rows, columns = mask.shape
    exact_cost = float(mask.sum(1).double().pow(3).sum()) / 3
    cg_cost = float(_CG_TYPICAL) * rows * columns**2
    if config.solver == "exact" or (config.solver == "auto" and exact_cost < cg_cost):
        return exact_rows(H, target, mask), {"refit_iterations": 0.0}
    weight, done = conjugate_gradients(H, target, mask, start, config.tolerance, config.iterations)
    return weight, {"refit_iterations": float(done)}


def refit(problem: Problem, config: Refit) -> Solved:
    """Best weights under the mask of the step before (or of the constraint)."""
    weight, mask = problem.weight, None
    if problem.start is not None:
        weight, mask = problem.start.weight, problem.start.mask
    if mask is None and problem.constraint.sparse:
        mask = problem.constraint.select(problem.weight.abs() * problem.stats.norm)
    if mask is None:
        mask = torch.ones_like(weight, dtype=torch.bool)
    notes: dict[str, float] = {}
    if not bool(mask.all()):
        weight, notes = least_squares(problem, mask, weight, config)
    if problem.constraint.quantized:
        frozen = Problem(problem.weight, problem.stats, problem.constraint.freeze(mask), problem.names)
        solved = sweep(frozen, problem.factor(config.damping), target=weight)
        return Solved(solved.weight, solved.codes, mask, problem.error(solved.weight, config.damping), notes)
    return Solved(weight, None, mask, problem.error(weight, config.damping), notes)
