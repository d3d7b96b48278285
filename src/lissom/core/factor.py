"""The one factorisation on which all second-order solvers stand.

For the damped layer Hessian ``H`` (in, in) we need ``U`` upper triangular with ``H⁻¹ = Uᵀ U``: row j of
the inverse of the trailing block is ``U_jj · U[j, j:]`` (methods/01 §2.1). Writing ``H = R Rᵀ`` with R
*upper* triangular (a Cholesky factorisation of the index-reversed matrix) gives ``U = R⁻¹`` with one
factorisation and one triangular inverse; the reference codes invert H and factorise again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericalError
from .finite import is_finite

_ESCALATIONS = 8
_SMALL = 128  # below this a triangular system is solved at once


@dataclass(frozen=True)
class Factor:
    """``U: (in, in)`` upper triangular, ``H⁻¹ = UᵀU`` for the *ordered, damped* Hessian.

    ``dead``: (in,) bool, inputs that were zero on all tokens (their weights are set to zero).
    ``damping``: the fraction of the mean diagonal that was added in the end (escalated ×10 until the
    matrix is positive definite). ``order``: (in,) the column permutation, or None.
    """

    U: Tensor
    dead: Tensor
    damping: float
    order: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """``U_jj``, (in,), in the order of :attr:`order`."""
        return self.U.diagonal()


def damped(H: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """``H + fraction · mean(diag H) · I`` with dead inputs set to 1, and the mask of dead inputs."""
    H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    alive = ~dead
    mean = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_ones(())
    diagonal[dead] = mean
    diagonal += fraction * mean
    return H, dead


def invert_upper(R: Tensor) -> Tensor:
    """``R⁻¹`` of an upper triangular (n, n), by halves: [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]].

    Solving against the identity does three times the multiplications: 89 against 36 ms for n = 1536 on one core.
    """
    n = len(R)
    if n <= _SMALL:
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    half = n // 2
    out = torch.zeros_like(R)
    out[:half, :half] = invert_upper(R[:half, :half])
    out[half:, half:] = invert_upper(R[half:, half:])
    out[:half, half:] = -(out[:half, :half] @ (R[:half, half:] @ out[half:, half:]))
    return out


def _roots(H: Tensor, damping: float) -> Iterator[tuple[Tensor, Tensor, float]]:
    """``R`` upper triangular with R Rᵀ the damped H, the dead inputs, and the damping: first as asked, then tenfold each time.

    Raises :class:`NumericalError` when no damping helps.
    """
    if not is_finite(H):
        raise NumericalError("the Gram matrix is not finite: the calibration activations overflow or hold NaN")
    fraction = damping
    for _ in range(_ESCALATIONS):
        D, dead = damped(H, fraction)
        L, info = torch.linalg.cholesky_ex(D.flip(0, 1))
        if int(info) == 0:
            yield L.flip(0, 1), dead, fraction
        fraction = max(fraction, 1e-4) * 10
    raise NumericalError(
        f"the Gram matrix is not positive definite even with damping {fraction / 10:g}: "
        "use more calibration text, or exclude the layer with `ignore`"
    )


def factorise(H: Tensor, damping: float = 0.01, order: Tensor | None = None) -> Factor:
    """Factor of the damped Hessian; raises :class:`NumericalError` when no damping helps."""
    H = H if order is None else H[order][:, order]
    return next(
        Factor(U, dead, fraction, order) for R, dead, fraction in _roots(H, damping) if is_finite(U := invert_upper(R))
    )


@dataclass(frozen=True)
class Side:
    """One factor of a two-sided Hessian in ``order`` (n,), by falling diagonal: ``U`` (n, n) upper triangular with ones on the
    diagonal and U D Uᵀ = H, the feedback of LDLQ (methods/02 §14) plus one."""

    order: Tensor
    U: Tensor


def side(H: Tensor, damping: float) -> Side:
    """The side of the damped H; raises :class:`NumericalError` when no damping helps."""
    order = H.diagonal().argsort(descending=True, stable=True)
    roots = ((R / R.diagonal()).contiguous() for R, _, _ in _roots(H[order][:, order], damping))
    return Side(order, next(U for U in roots if is_finite(U)))
