"""VS-Quant: one scale for every short vector of weights, the scales themselves small integers.

    s_v = max|w_v| / (2^(N−1) − 1),   γ = max_v s_v / (2^M − 1) per output row,   ŝ_v = γ · round(s_v/γ),   ŵ = q · ŝ_v

W: (out, in), vectors of the constraint's group size (16–64) along the input; N its bits, M = ``scale_bits``. ``ceil``
rounds scales up so that nothing is clipped. q is chosen for the rounded scale. Stored: ``TwoLevel``; N + M/V bits per
weight and one fp16 γ per row. Zero is a level, so masks stay exact. Activations: :func:`fake_vectors`, γ per tensor.
Source: Dai et al., MLSys 2021 (arXiv 2102.04503), eq. 5–7; methods/02 §10. Differs: scale codes start at 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Problem, Second, Solved, TwoLevel
from ...core.grid import spread_groups
from .common import finish, grids, half, layers, restack, start


@dataclass(frozen=True)
class VSQuant:
    """``scale_bits`` M, 1–8; ``ceil``: never clip."""

    scale_bits: int = 6
    ceil: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.scale_bits <= 8:
            raise ValueError(f"scale_bits must be 1 … 8, not {self.scale_bits}")


def vector_scales(W: Tensor, bits: int, group: int, config: VSQuant) -> Second:
    """Quantized scales of every vector of ``W: (rows, columns)``."""
    count = math.ceil(W.shape[1] / group)
    padded = torch.nn.functional.pad(W, (0, count * group - W.shape[1])).reshape(len(W), count, group)
    scale = padded.abs().amax(2) / (2 ** (bits - 1) - 1)
    top = 2**config.scale_bits - 1
    gamma = half(scale.amax(1, keepdim=True) / top)
    gamma = torch.where(gamma > 0, gamma, torch.ones_like(gamma))
    codes = (torch.ceil if config.ceil else torch.round)(scale / gamma).clamp(1, top)
    return Second(codes.to(torch.uint8), gamma, torch.zeros_like(gamma), config.scale_bits, count)


def vector_quantize(W: Tensor, bits: int, group: int, config: VSQuant) -> TwoLevel:
    """Codes 1 … 2^N − 1 around the zero point 2^(N−1)."""
    scales = vector_scales(W, bits, group, config)
    middle = float(2 ** (bits - 1))
    wide = spread_groups(scales.decode(), W.shape[1], group)
    values = torch.round(W / wide).clamp(1 - middle, middle - 1) + middle
    return TwoLevel(values.to(torch.uint8), scales, middle, bits, group)


def fake_vectors(x: Tensor, bits: int = 8, group: int = 16, config: VSQuant | None = None) -> Tensor:
    """Simulated quantization of activations ``x: (tokens, in)``, dynamic, one γ for the tensor."""
    config = config or VSQuant()
    count = math.ceil(x.shape[1] / group)
    padded = torch.nn.functional.pad(x, (0, count * group - x.shape[1])).reshape(len(x), count, group)
    scale = padded.abs().amax(2) / (2 ** (bits - 1) - 1)
    top = 2**config.scale_bits - 1
    gamma = half(scale.amax() / top)
    gamma = torch.where(gamma > 0, gamma, torch.ones_like(gamma))
    scale = (torch.ceil if config.ceil else torch.round)(scale / gamma).clamp(1, top) * gamma
    wide, limit = spread_groups(scale, x.shape[1], group), 2 ** (bits - 1) - 1
    return torch.round(x / wide).clamp(-limit, limit) * wide


def vs_quant(problem: Problem, config: VSQuant) -> Solved:
    """Every layer of the stack."""
    out = []
    for layer, (_, grid) in zip(layers(problem), grids(problem, "vs-quant"), strict=True):
        W, mask = start(layer)
        group = min(grid.group_size or W.shape[1], W.shape[1])
        out.append(finish(layer, stored=vector_quantize(W, grid.bits, group, config), mask=mask))
    return restack(problem, out)
