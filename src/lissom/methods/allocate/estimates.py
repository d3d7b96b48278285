"""The pruning loss of a layer, estimated from the rows of its inverse Hessian (methods/01 §2.3).

Per-weight score ``E[r, c] = W[r, c]² / (2 U_cc²)``: the loss of removing one weight when all columns
before it are gone in every row, an upper bound of the exact loss that is tight as sparsity grows.

    A   mean of E over the layer, mask-free
    B   mean over the weights that the target would remove: the lowest scores of each block of 128 columns
    C   the measured loss of one real SparseGPT pass at the target, Σ losses / (R·C)

``output-energy`` divides by ½ tr(W H Wᵀ)/(R·C). Raw losses grow with depth and activation scale; relative
ones compare layers. ``stream`` multiplies the relative loss by the share that the layer's block has in the residual
stream, median over tokens of ‖h_out − h_in‖² / ‖h_out‖² (:func:`in_stream`): later blocks normalise what they read, so
a relative error of a block that writes most of the stream (the first ones, often the last) weighs more. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from ...core import Both, LayerSummary, Problem, Sparse, Stack, sweep

Estimate = Literal["A", "B", "C"]
Normalize = Literal["none", "output-energy", "stream"]
_COLUMNS = 128


def layer_losses(
    problems: Sequence[Problem], estimate: Estimate, normalize: Normalize, target: float, damping: float
) -> list[float]:
    """One number per layer of each stack, in order."""
    out = []
    for problem in problems:
        d = problem.factor(damping).diagonal
        columns = problem.weight.shape[1]
        energy = problem.energy() if normalize != "none" else None
        if estimate == "C":
            rows = [r.stop - r.start for r, _ in problem.constraint.slices()]
            stack = Stack(tuple((n, Both(Sparse(target))) for n in rows))
            losses = sweep(replace(problem, constraint=stack, start=None), problem.factor(damping)).error
        else:
            losses = None
        for rows, _ in problem.constraint.slices():
            W = problem.weight[rows]
            if losses is not None:
                total = float(losses[rows].sum())
            else:
                E = W.square() / (2 * d.square())
                if estimate == "A":
                    total = float(E.sum())
                else:
                    total = 0.0
                    for block in E.split(_COLUMNS, 1):
                        total += _smallest(block.reshape(-1), round(target * block.numel()))
            total /= (rows.stop - rows.start) * columns
            if energy is not None:
                total /= max(float(energy[rows].sum()) / ((rows.stop - rows.start) * columns), 1e-30)
            out.append(total)
    return out


def in_stream(layer: LayerSummary, normalize: Normalize) -> float:
    """The layer's loss as allocations compare it: with ``stream``, times its block's share of the stream."""
    loss = layer.values["loss"]
    return loss * layer.values["share"] if normalize == "stream" else loss


def _smallest(x: Tensor, count: int) -> float:
    """Sum of the ``count`` smallest entries; by threshold, which is several times faster than sorting."""
    if not count:
        return 0.0
    threshold = x.kthvalue(count).values
    below = x < threshold
    return float(x[below].sum() + threshold * (count - below.sum()))
