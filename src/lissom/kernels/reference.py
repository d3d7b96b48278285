"""What the C++ kernels compute, in plain torch: the definition that they are tested against.

Activations are quantized to int8 on the fly, one scale for each group of G inputs of a token:
``s = max|x| / 127, q = round(x · 127 / max|x|)``; products and sums inside a group are exact integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.grid import Codes, spread_groups


def quantize_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``x: (tokens, in)`` → integral ``q`` fp32 (tokens, groups, group), zero padded, and ``scale`` (tokens, groups)."""
    tokens, columns = x.shape
    groups = -(-columns // group)
    padded = x.new_zeros(tokens, groups * group)
    padded[:, :columns] = x
    blocks = padded.reshape(tokens, groups, group)
    top = blocks.abs().amax(2)
    inverse = torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
    return torch.round(blocks * inverse[..., None]), top / 127.0


def linear(codes: Codes, mask: Tensor | None, x: Tensor, group: int) -> Tensor:
    """``y = x Wᵀ`` (tokens, out) of codes (out, in) under ``mask`` (True = kept) with int8 activations."""
    rows, columns = codes.values.shape
    integers = codes.values.double() - spread_groups(codes.zero, columns, codes.group_size).double()
    if mask is not None:
        integers = integers * mask
    q, sx = quantize_activations(x.float(), group)
    groups = q.shape[1]
    w = torch.zeros(rows, groups * group, dtype=torch.float64)
    w[:, :columns] = integers
    sums = torch.einsum("tgi,rgi->tgr", q.double(), w.reshape(rows, groups, group))
    scale = spread_groups(codes.scale, columns, codes.group_size)[:, ::group].double()  # (rows, groups)
    return torch.einsum("tgr,rg,tg->tr", sums, scale, sx.double()).float()


def binary_linear(signs: Tensor, alpha: Tensor, offset: Tensor, group_size: int, x: Tensor, group: int) -> Tensor:
    """``y = x Wᵀ`` for ``W = offset + Σ_b alpha_b · (2 signs_b − 1)``: signs (bits, out, in), alpha (bits, out, groups)."""
    columns = signs.shape[2]
    W = spread_groups(offset, columns, group_size).double()
    for sign, a in zip(signs, alpha, strict=True):
        W = W + spread_groups(a, columns, group_size).double() * (2.0 * sign.double() - 1)
    q, sx = quantize_activations(x.float(), group)
    X = (q.double() * sx.double()[..., None]).reshape(x.shape[0], -1)[:, :columns]
    return (X @ W.T).float()
