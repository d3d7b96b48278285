"""The innermost loop of the sweep: a few columns are decided one after the other.

:func:`decide_columns` is the definition, in torch. A problem may carry another :data:`ColumnLoop` with the same results up to
rounding (:attr:`.Problem.loop`); the pipeline gives it the compiled one of :mod:`lissom.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import GridParams


@dataclass(frozen=True)
class Strip:
    """A block of columns in the middle of a sweep, transposed: a column of W is a row here.

    ``w: (span, rows)`` the weights as updated so far; ``u: (span, span)`` the block of U; ``keep: (span, rows)`` bool, None: all.
    Written column by column: ``q`` (span, rows) the decided weights, ``errors`` (span, rows), ``codes`` (span, rows) uint8 or None.
    """

    w: Tensor
    u: Tensor
    keep: Tensor | None
    q: Tensor
    errors: Tensor
    codes: Tensor | None


ColumnLoop = Callable[[Strip, GridParams | None, int, int, int], None]


def decide_columns(strip: Strip, params: GridParams | None, begin: int, end: int, reach: int) -> None:
    """Decide the columns ``begin … end − 1``; their errors update those up to ``reach − 1``.

    ``params``: scale, zero point and levels of each row, (rows,) each, or None without a grid.
    """
    w, u = strip.w, strip.u
    for i in range(begin, end):
        value = w[i]
        q = value
        if strip.keep is not None:
            q = torch.where(strip.keep[i], q, 0.0)  # a product would leave −0.0
        if params is not None:
            code = params.round(q)
            assert strip.codes is not None
            strip.codes[i] = code.to(torch.uint8)
            q = params.decode(code)
        strip.q[i] = q
        e = (value - q) / u[i, i]
        strip.errors[i] = e
        if i + 1 < reach:
            w[i + 1 : reach].addr_(u[i, i + 1 : reach], e, alpha=-1)
