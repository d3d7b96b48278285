"""ALPS: choose the zeros by ADMM on the layer's error, then solve for the kept weights.

    minimise ½ tr((Ŵ − W) H (Ŵ − W)ᵀ)   subject to Ŵ ∈ pattern
    split into B, smooth, and D, with zeros; U = V/ρ the multiplier:

    B ← (W H + ρ (D − U))(H + ρ I)⁻¹        D ← keep the largest (B̂ + U)², B̂ = αB + (1−α)D        U ← U + B̂ − D
    at the end: conjugate gradients on the support of D (:mod:`.least_squares`)

H is damped and scaled to unit diagonal (W takes the inverse scale), so that one ρ suits all inputs. ρ rises by 1.7, 1.5 or
1.25 every ``interval`` iterations, faster the more the support still moves.

After a step D and U are the kept and the dropped entries of one matrix, and with P = ρ(H + ρI)⁻¹ the smooth step is
B + U = W + U + (D − U − W) P: neither W H nor V is formed, and an iteration is one product and five passes over the weights.
Where the processor multiplies bfloat16 faster, the factors of that product are rounded to it: only the support comes out of the
iterations, and layer errors stay the same to 0.1%.

Cost: 2·in³ multiplications for every ρ (Cholesky inverse; no eigenvectors), out·in² an iteration. At 70%, strongly correlated
inputs, against SparseGPT's layer error = 1: refit of its mask 0.62, ALPS 0.36; an exhaustive search of swaps afterwards gains
2% more at ten times the cost.

Source: Meng, Behdin, Wang, Mazumder, NeurIPS 2024 (arXiv 2406.07831), algorithm 1; methods/03 §16. Relaxation: Boyd et al. 2011 §3.4.3.
Differs: layers with one input are one stack under budgets of their own; relaxed steps (α = 1.4), with which ρ may rise in larger
steps; ρ starts at 0.05 instead of 0.1; no restart (ρ/5) when the support does not move at first; the final CG
starts from D and has a tolerance instead of ten steps. Starting D from SparseGPT's weights changes nothing and is left out.
A grid in the constraint is met by a last error-feedback sweep on the frozen mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core import Fixed, NumericalError, Problem, Solved, Stack, damped
from .least_squares import Refit, on_support


@dataclass(frozen=True)
class ALPS:
    """``iterations`` of ADMM at most; ``rho`` the first penalty (of a unit diagonal); ``interval``: iterations between
    raises of ρ; ``relaxation``: α, 1 ≤ α < 2; ``settled``: stop when a smaller share of the support changed within an
    interval; ``tolerance``: of the final CG; ``damping``: fraction of mean(diag H) added.
    """

    iterations: int = 60
    rho: float = 0.05
    interval: int = 5
    relaxation: float = 1.4
    settled: float = 1e-3
    tolerance: float = 1e-2
    damping: float = 0.01


def shrinkage(H: Tensor, rho: float) -> Tensor:
    """``ρ (H + ρ I)⁻¹``, (in, in); raises :class:`NumericalError` when H is not positive definite."""
    shifted = H.clone()
    shifted.diagonal().add_(rho)
    L, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise NumericalError(
            "alps: the Gram matrix is not positive definite; raise `damping` or `rho`, or use more calibration text"
        )
    return torch.cholesky_inverse(L).mul_(rho)


def quick_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 run at twice the speed of float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(supported.get("avx512_bf16") or supported.get("amx_bf16"))


def admm(H: Tensor, W: Tensor, pattern: Stack, config: ALPS) -> tuple[Tensor, Tensor, int]:
    """Support (bool, (rows, in)), weights on it, and iterations done; H has unit diagonal."""
    rho, alpha = config.rho, config.relaxation
    D, U = W.clone(), torch.zeros_like(W)
    moved, y = torch.empty_like(W), torch.empty_like(W)  # fresh memory for every large result costs as much as the sums
    low = quick_bfloat16(W.device) and W.dtype == torch.float32
    P = shrinkage(H, rho)
    rounded = P.bfloat16() if low else P
    support = before = pattern.select(W.square())
    kept = max(1, int(before.count_nonzero()))
    done = 0
    for done in range(1, config.iterations + 1):
        torch.sub(D, U, out=y).sub_(W)
        torch.lerp(D, W, alpha, out=moved).add_(U)
        if low:
            moved.add_(y.bfloat16() @ rounded, alpha=alpha)
        else:
            moved.addmm_(y, P, alpha=alpha)  # B̂ + U
        support = pattern.select(torch.mul(moved, moved, out=y))  # squares: a unit's distance to zero
        torch.mul(moved, y.copy_(support), out=D)  # products with bools are slow
        torch.sub(moved, D, out=U)
        if done % config.interval == 0:
            change = int((support != before).count_nonzero()) / kept
            before = support
            if change < config.settled or done == config.iterations:
                break
            factor = 1.7 if change > 0.1 else 1.5 if change > 0.005 else 1.25
            rho *= factor
            U /= factor
            P = shrinkage(H, rho)
            rounded = P.bfloat16() if low else P
    return support, D, done


def alps(problem: Problem, config: ALPS) -> Solved:
    """ADMM for the support (unless it is fixed already), then the best weights on it."""
    pattern = Stack(tuple((rows, replace(part, grid=None)) for rows, part in problem.constraint.parts))
    H, dead = damped(problem.stats.hessian, config.damping)
    scale = H.diagonal().sqrt()
    W = torch.where(dead, 0.0, problem.weight)
    done = 0
    if all(part.pattern is None or isinstance(part.pattern, Fixed) for _, part in pattern.parts):
        mask = pattern.select(W)
        start = W if problem.start is None else problem.start.weight
    else:
        mask, D, done = admm(H / scale / scale[:, None], W * scale, pattern, config)
        start = D / scale
    solved = on_support(problem, mask, start, Refit("cg", config.tolerance, damping=config.damping))
    return replace(solved, notes={**solved.notes, "admm_iterations": float(done)})
