"""Non-uniform grids: every weight is an entry of a small table times the scale of its group.

    q = argmin_k |w/s − c_k|,   ŵ = s · c_q

    nf            quantiles of N(0, 1) with an exact zero, any bits ≤ 8; bits = 4 is NF4       (QLoRA, 2305.14314)
    fp4           E2M1: ±{0, .5, 1, 1.5, 2, 3, 4, 6}, fp16 scales
    mxfp4         E2M1 in blocks of 32 with scales 2^e,  e = ⌊log2 amax⌋ − 2                   (OCP MX 1.0)
    nvfp4         E2M1 in blocks of 16 with E4M3 scales under one fp32 scale g = amax/(6·448)
    e4m3, e5m2    8-bit floats (largest 448, 57344), fp16 scales
    power-of-two  0 and ±2^−i: products are shifts
    kmeans        a table per row (or layer) by Lloyd's iterations, weighted by E[x²] when asked   (SqueezeLLM, 2306.07629)

W: (out, in). Rounding is to nearest; data is needed only for ``weighted``. Zeros of a mask stay exact: every table holds
zero (k-means gets one when there is a mask). Differs: NF with other bits uses QLoRA's construction with its offset.
Sources: methods/02 §0.1, 24, 26.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...core import HOST, Levels, Masked, Problem, RecipeError, Solved
from ...core.grid import spread_groups
from .common import finish, grids, half, layers, restack, start

Table = Literal["nf", "fp4", "mxfp4", "nvfp4", "e4m3", "e5m2", "power-of-two", "kmeans"]
_BITS = {"fp4": 4, "mxfp4": 4, "nvfp4": 4, "e4m3": 8, "e5m2": 8}
_BLOCK = {"mxfp4": 32, "nvfp4": 16}


@dataclass(frozen=True)
class Codebook:
    """``table``: see the module. ``shrink``: search scales down to this fraction of the largest magnitude for the least
    squared error (1 = no search). k-means: ``per`` row | layer, ``rounds`` of Lloyd, ``weighted`` by E[x²]."""

    table: Table = "nf"
    shrink: float = 1.0
    per: Literal["row", "layer"] = "row"
    rounds: int = 20
    weighted: bool = False


def normal_float(bits: int) -> Tensor:
    """(2^bits,) rising, from −1 to 1 with 0: 2^(b−1) quantiles below zero, 2^(b−1) + 1 above, sharing zero."""
    n, offset = 2 ** (bits - 1), 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, n + 1, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1])
    table = torch.cat([below, above, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (table / table.max()).float()


def small_float(exponent: int, mantissa: int, bias: int, top: float) -> Tensor:
    """All finite values of a sign-exponent-mantissa format with subnormals, rising, without −0, cut at ± ``top``."""
    values = [m * 2.0 ** (1 - bias - mantissa) for m in range(2**mantissa)]
    for e in range(1, 2**exponent):
        values += [(1 + m / 2**mantissa) * 2.0 ** (e - bias) for m in range(2**mantissa)]
    kept = [v for v in values if v <= top]
    return torch.tensor(sorted({-v for v in kept} | set(kept)))


@lru_cache(maxsize=32)
def table_of(name: str, bits: int) -> Tensor:
    """The levels of a known table, (levels,) rising."""
    if name == "nf":
        return normal_float(bits)
    if name in ("fp4", "mxfp4", "nvfp4"):
        return small_float(2, 1, 1, 6.0)
    if name == "e4m3":
        return small_float(4, 3, 7, 448.0)
    if name == "e5m2":
        return small_float(5, 2, 15, 57344.0)
    n = 2 ** (bits - 1)
    return torch.tensor(sorted([0.0, *(2.0**-i for i in range(n)), *(-(2.0**-i) for i in range(n - 1))]))


def nearest(table: Tensor, w: Tensor) -> Tensor:
    """Index (int64) of the closest entry of the rising ``table: (levels,)``."""
    return torch.bucketize(w, (table[1:] + table[:-1]) / 2)


def _e4m3(t: Tensor) -> Tensor:
    return t.clamp(max=448.0).to(torch.float8_e4m3fn).float()


def scales(amax: Tensor, name: str, top: float) -> tuple[Tensor, str, float]:
    """Block scales (exact in their format) for largest magnitudes ``amax``; their format; the tensor's scale."""
    if name == "mxfp4":
        exponent = torch.floor(torch.log2(amax.clamp_min(2.0**-120))) - 2
        return torch.where(amax > 0, torch.exp2(exponent), torch.ones_like(amax)), "e8m0", 1.0
    if name == "nvfp4":
        largest = float(amax.max())
        tensor_scale = float(torch.tensor(largest / (6 * 448))) if largest > 0 else 1.0
        block = _e4m3(amax / top / tensor_scale)
        return torch.where(block > 0, block, torch.ones_like(block)) * tensor_scale, "e4m3", tensor_scale
    scale = half(amax / top)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), "float16", 1.0


def known(W: Tensor, name: str, bits: int, group: int, shrink: float) -> Levels:
    """Round to the nearest level of a known table."""
    with HOST:  # kept for everyone
        table = table_of(name, bits)
    table = table.to(W.device)
    top = float(table.abs().max())
    columns = W.shape[1]
    count = math.ceil(columns / group)
    padded = torch.nn.functional.pad(W, (0, count * group - columns)).reshape(len(W), count, group)
    amax = padded.abs().amax(2)
    best, error = None, torch.full_like(amax, torch.inf)
    steps = 1 if shrink >= 1 else 1 + round((1 - shrink) / 0.02)
    kind, tensor_scale = "float16", 1.0
    for i in range(steps):
        scale, kind, tensor_scale_i = scales(amax * (1 - 0.02 * i), name, top)
        if i == 0:
            tensor_scale = tensor_scale_i
        elif name == "nvfp4":  # the tensor's scale is that of the unshrunk blocks
            block = _e4m3(amax * (1 - 0.02 * i) / top / tensor_scale)
            scale = torch.where(block > 0, block, torch.ones_like(block)) * tensor_scale
        loss = (table[nearest(table, padded / scale[..., None])] * scale[..., None] - padded).square().sum(2)
        best = scale if best is None else torch.where(loss < error, scale, best)
        error = torch.minimum(loss, error)
    assert best is not None
    values = nearest(table, W / spread_groups(best, columns, group)).to(torch.uint8)
    label = f"nf{bits}" if name == "nf" else name
    return Levels(values, table[None], best, group, label, kind, tensor_scale)


def kmeans(W: Tensor, bits: int, config: Codebook, weight: Tensor | None, zero: bool) -> Levels:
    """Tables by Lloyd from equal-count quantiles; ``weight`` (in,) of the squared errors; ``zero`` forces a level there."""
    rows, columns = W.shape
    X = W if config.per == "row" else W.reshape(1, -1)
    wide = torch.ones(columns) if weight is None else weight
    importance = wide.expand(rows, columns).reshape(X.shape)
    k = 2**bits
    quantiles = (torch.arange(k) + 0.5) / k
    centres = X.sort(1).values[:, (quantiles * X.shape[1]).long().clamp_max(X.shape[1] - 1)].contiguous()

    def assign(c: Tensor) -> Tensor:
        return torch.searchsorted(((c[:, 1:] + c[:, :-1]) / 2).contiguous(), X.contiguous())

    for _ in range(config.rounds):
        index = assign(centres)
        mass = torch.zeros_like(centres).scatter_add_(1, index, importance)
        total = torch.zeros_like(centres).scatter_add_(1, index, importance * X)
        centres = torch.where(mass > 0, total / mass.clamp_min(1e-30), centres).sort(1).values
    if zero:
        closest = centres.abs().argmin(1, keepdim=True)
        centres = centres.scatter(1, closest, torch.zeros_like(closest, dtype=centres.dtype))
    centres = half(centres)
    values = assign(centres).reshape(rows, columns).to(torch.uint8)
    return Levels(values, centres, torch.ones(rows, 1), columns, "kmeans", custom=True)


def codebook(problem: Problem, config: Codebook) -> Solved:
    """Round every layer of the stack to its table."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "codebook"), strict=True):
        name = config.table
        if name in _BITS and grid.bits != _BITS[name]:
            raise RecipeError(f"`codebook` on {layer.names[0]}: table {name} has {_BITS[name]} bits, not {grid.bits}")
        W, mask = start(layer)
        if name == "kmeans":
            importance = layer.stats.sumsq / max(layer.stats.count, 1) + 1e-12 if config.weighted else None
            form = kmeans(W, grid.bits, config, importance, mask is not None)
        else:
            group = _BLOCK.get(name) or min(grid.group_size or W.shape[1], W.shape[1])
            form = known(W, name, grid.bits, group, config.shrink)
        weight = form.decode()
        safe = mask is None or not bool(weight[~mask].any())
        out.append(finish(layer, stored=form if safe else Masked(form, mask), mask=mask))  # type: ignore[arg-type]
    return restack(problem, out)
