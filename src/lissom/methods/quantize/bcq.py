"""Binary-coded quantization (BCQ), the format of LUT-GEMM: a group is a sum of scaled sign vectors.

    w ≈ Σ_{i=1..b} α_i b_i + z,   b_i ∈ {−1, +1}^g
    start    greedy: b_i = sign(r), α_i = mean|r|, r ← r − α_i b_i          z = mean(w) when ``offset``
    repeat   (α, z) = least squares for given signs;  each weight takes the nearest of the 2^b sums

A uniform b-bit grid with scale s is the special case α_i = s 2^(i−2), i = 1…b (:func:`from_uniform`). The product with x
needs no multiplication by weights: a table holds the 2^μ signed sums of every μ inputs, and the packed signs look
them up (:func:`lut_product`, the reference of a kernel).
W: (out, in); data-free; 15 rounds. Zeros of a mask are not sums of signs and are stored beside.
Source: Park et al., LUT-GEMM, ICLR 2024 (arXiv 2206.09557), eq. 2–3; methods/02 §30.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Binary, Codes, Masked, Problem, Solved
from .common import finish, grids, half, layers, restack, start


@dataclass(frozen=True)
class BCQ:
    """``rounds`` of refinement; ``offset``: fit z too."""

    rounds: int = 15
    offset: bool = True


def _patterns(bits: int) -> Tensor:
    """All sign vectors, (2^bits, bits)."""
    return (torch.arange(2**bits)[:, None] >> torch.arange(bits)[None]).bitwise_and(1).float() * 2 - 1


def binary_code(w: Tensor, bits: int, config: BCQ) -> tuple[Tensor, Tensor, Tensor]:
    """For ``w: (groups, n)``: signs bool (bits, groups, n), α (bits, groups), z (groups,), the last two fp16-exact."""
    z = w.mean(1) if config.offset else torch.zeros(len(w))
    r, signs, alphas = w - z[:, None], [], []
    for _ in range(bits):
        b, a = torch.where(r >= 0, 1.0, -1.0), r.abs().mean(1)
        signs.append(b)
        alphas.append(a)
        r = r - a[:, None] * b
    B, alpha = torch.stack(signs, 2), torch.stack(alphas, 1)  # (groups, n, bits), (groups, bits)
    patterns = _patterns(bits)

    def choose(alpha: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        sums, order = (alpha @ patterns.T).sort(1)
        between = ((sums[:, 1:] + sums[:, :-1]) / 2 + z[:, None]).contiguous()
        B = patterns[order.gather(1, torch.searchsorted(between, w.contiguous()))]
        error = ((B @ alpha[..., None])[..., 0] + z[:, None] - w).square().sum(1)
        return B, error

    best_alpha, best_z = alpha, z
    _, least = choose(alpha, z)
    for _ in range(config.rounds):
        A = torch.cat([B, torch.ones_like(B[..., :1])], 2) if config.offset else B
        gram = A.transpose(1, 2) @ A
        gram = gram + 1e-4 * torch.eye(gram.shape[1])  # equal sign vectors make it singular
        solution = torch.linalg.solve(gram, A.transpose(1, 2) @ w[..., None])[..., 0]
        alpha = solution[:, :bits]
        z = solution[:, bits] if config.offset else z
        B, error = choose(alpha, z)
        better = error < least
        least = torch.where(better, error, least)
        best_alpha, best_z = torch.where(better[:, None], alpha, best_alpha), torch.where(better, z, best_z)
    best_alpha, best_z = half(best_alpha), half(best_z)
    B, _ = choose(best_alpha, best_z)
    return (B > 0).permute(2, 0, 1), best_alpha.T, best_z


def from_uniform(codes: Codes) -> Binary:
    """The same weights (up to fp32 rounding) as binary codes: α_i = s 2^(i−1)/2 for bit i = 0 …, z = s(2^b − 1)/2 − s·zero."""
    bits = codes.bits
    planes = torch.stack([(codes.values.long() >> i).bitwise_and(1).bool() for i in range(bits)])
    alpha = torch.stack([codes.scale * 2.0 ** (i - 1) for i in range(bits)])
    return Binary(planes, alpha, codes.scale * ((2**bits - 1) / 2 - codes.zero), codes.group_size)


def lut_product(form: Binary, x: Tensor, width: int = 8) -> Tensor:
    """``W x`` for ``x: (in,)`` by table look-up: (out,). ``width`` inputs share a table of 2^width sums."""
    planes, rows, columns = form.signs.shape
    group = form.group_size
    y = torch.zeros(rows)
    bit = torch.arange(width)
    patterns = _patterns(width)
    for g, at in enumerate(range(0, columns, group)):
        stop = min(at + group, columns)
        span = -(-(stop - at) // width) * width
        chunk = torch.nn.functional.pad(x[at:stop], (0, span - (stop - at))).reshape(-1, width)
        table = chunk @ patterns.T  # (chunks, 2^width)
        signs = torch.nn.functional.pad(form.signs[:, :, at:stop].long(), (0, span - (stop - at)))
        index = (signs.reshape(planes, rows, -1, width) << bit).sum(3)  # (planes, rows, chunks)
        sums = table[torch.arange(len(chunk)), index].sum(2)
        y += (form.alpha[:, :, g] * sums).sum(0) + form.offset[:, g] * x[at:stop].sum()
    return y


def bcq(problem: Problem, config: BCQ) -> Solved:
    """Every layer of the stack with its number of sign planes."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "bcq"), strict=True):
        W, mask = start(layer)
        columns = W.shape[1]
        group = min(grid.group_size or columns, columns)
        fits = [binary_code(w, grid.bits, config) for w in W.split(group, 1)]
        signs = torch.cat([f[0] for f in fits], 2)
        alpha, offset = torch.stack([f[1] for f in fits], 2), torch.stack([f[2] for f in fits], 1)
        form = Binary(signs, alpha, offset, group)
        out.append(finish(layer, stored=form if mask is None else Masked(form, mask), mask=mask))
    return restack(problem, out)
