"""GPTQ (OPTQ): round column by column and let the free columns absorb the error.

    e = (w − quant(w)) / U_jj,   W[:, k] ← W[:, k] − e · U_jk  (k > j),   H⁻¹ = UᵀU

``act_order`` takes columns by falling diag(H), so that the columns that matter most are rounded while
many are still free; grids are then fitted on the original weights (``static_groups``), which keeps groups
contiguous in the stored layout, where the reference needs a ``g_idx``.
Source: Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023 (arXiv 2210.17323); methods/02 §13.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core import Problem, Solved, sweep


@dataclass(frozen=True)
class GPTQ:
    """``damping``: fraction of mean(diag H). ``block``: lazy-update width. The rest: see the module."""

    damping: float = 0.01
    block: int = 128
    act_order: bool = False
    static_groups: bool = False


def gptq(problem: Problem, config: GPTQ) -> Solved:
    """One sweep. After a pruning step its zeros stay and its weights are the starting point."""
    factor = problem.factor(config.damping, config.act_order)
    target = problem.start.weight if problem.start is not None else None
    solved = sweep(problem, factor, config.block, config.static_groups, target)
    if target is None:
        return solved
    # the sweep's loss is the distance to its start; what counts is the distance to the dense weights
    return Solved(solved.weight, solved.codes, solved.mask, problem.error(solved.weight, config.damping), solved.notes)
