"""Blocks of columns and small problems on which loops of the sweep are compared."""

import torch

from lissom.core import GridParams, Problem, Stats
from lissom.core.columns import Strip
from lissom.core.two_sided import Entries


def strip(rows, span, masked, seed, whole_numbers=False):
    g = torch.Generator().manual_seed(seed)
    w, u = torch.randn(span, rows, generator=g), torch.randn(span, span, generator=g).triu() / span
    if whole_numbers:  # every product and sum is then exact, whatever the order
        w, u = (w * 8).round(), (u * span).round()
    u.diagonal().copy_(2.0 ** torch.randint(-1, 2, (span,), generator=g))
    keep = torch.rand(span, rows, generator=g) < 0.4 if masked else None
    return Strip(w, u, keep, torch.zeros_like(w), torch.zeros_like(w), torch.zeros(span, rows, dtype=torch.uint8))


def copied(s):
    return Strip(*(t.clone() if t is not None else None for t in (s.w, s.u, s.keep, s.q, s.errors, s.codes)))


def entries(rows, span, masked, seed):
    """In whole numbers and halves, of factors with few entries: every product and sum is exact, whatever the order."""
    g = torch.Generator().manual_seed(seed)

    def factor(n):
        sparse = torch.randint(-1, 2, (n, n), generator=g) * (torch.rand(n, n, generator=g) < 2 / n)
        return sparse.float().triu(1) + torch.eye(n)

    w, left = (torch.randint(-9, 10, (span, rows), generator=g).float() for _ in range(2))
    keep = torch.rand(span, rows, generator=g) < 0.4 if masked else None
    params = GridParams(torch.full_like(w, 2.0), torch.full_like(w, 3.0), torch.full_like(w, 8.0))
    return Entries(
        w, left, factor(span), factor(rows), keep, params, torch.zeros_like(w, dtype=torch.uint8), torch.zeros_like(w)
    )


def problem(constraint, rows=150, columns=160, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(500, columns, generator=g) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=g))
    return Problem.of(torch.randn(rows, columns, generator=g), Stats.of(X), constraint)


def agree(a, b):
    """Two solutions up to rounding: a mask or a code may flip where two choices are as good."""
    same = torch.ones_like(a.weight, dtype=torch.bool) if a.mask is None else a.mask == b.mask
    if a.codes is not None:
        same &= a.codes.values == b.codes.values
    assert same.float().mean() > 0.999
    assert torch.allclose(a.weight[same], b.weight[same], atol=2e-3)
    torch.testing.assert_close(a.error.sum(), b.error.sum(), rtol=1e-3, atol=0)
    if b.codes is not None:
        assert torch.equal(b.codes.decode(), b.weight)
