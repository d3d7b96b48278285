"""ggml's block formats, written from lissom's own codes where the grids match.

Every block holds 32 neighbours of a row; ``d`` and ``m`` are float16, ``u`` unsigned codes:

======  =====================  ==================  ==========================================================
type    weight                 bits a weight       exact for ``w = (code − zero) · scale`` when
======  =====================  ==================  ==========================================================
Q4_0    (u − 8) · d            4.5                 code − zero in −8 … 7: symmetric up to 4 bits, any 2–3 bits
Q5_0    (u − 16) · d           5.5                 code − zero in −16 … 15: any 4 bits, symmetric 5 bits
Q8_0    u · d (signed)         8.5                 code − zero in −128 … 127: any 7 bits, symmetric 8 bits
Q4_1    u · d + m              5                   only up to the rounding of m = −zero · scale to float16
======  =====================  ==================  ==========================================================

and a scale spans whole blocks. Layout of the bytes: llama.cpp, ggml-quants.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core import Codes
from ..core.grid import spread_groups

BLOCK = 32
_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
QUANTIZED = (*_RANGES, "Q4_1")


def blocks_fit(columns: int, group_size: int) -> bool:
    """Whether no block of a row spans two groups, and blocks fill the rows."""
    return columns % BLOCK == 0 and (group_size >= columns or group_size % BLOCK == 0)


def exact_types(codes: Codes) -> list[str]:
    """The block formats that hold ``codes`` exactly, smallest first."""
    if not blocks_fit(codes.values.shape[1], codes.group_size):
        return []
    signed = _signed(codes)
    low, high = int(signed.min()), int(signed.max())
    return [name for name, (least, most) in _RANGES.items() if least <= low and high <= most]


def encode_blocks(codes: Codes, kind: str) -> NDArray[np.uint8]:
    """Rows of blocks as bytes, (out, bytes a row). ``kind``: one of :func:`exact_types`, or Q4_1 for up to 4 bits."""
    rows = codes.values.shape[0]
    scale = _per_block(codes.scale, codes).half().numpy()
    fields: list[NDArray] = [scale.reshape(rows, -1, 1).view(np.uint8)]
    if kind == "Q4_1":
        low = _per_block(-codes.zero * codes.scale, codes).half().numpy()
        fields.append(low.reshape(rows, -1, 1).view(np.uint8))
        u = codes.values.numpy().reshape(rows, -1, BLOCK)
    else:
        u = (_signed(codes).numpy() - _RANGES[kind][0]).astype(np.uint8).reshape(rows, -1, BLOCK)
    if kind == "Q5_0":
        fields.append(np.packbits(u >> 4, axis=-1, bitorder="little"))
    if kind == "Q8_0":
        fields.append((u.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        fields.append((u[..., :16] & np.uint8(15)) | (u[..., 16:] & np.uint8(15)) << np.uint8(4))
    return np.concatenate(fields, axis=-1).reshape(rows, -1)


def q4_1_error(codes: Codes) -> float:
    """Largest difference that Q4_1's float16 minimum makes to a weight."""
    low = -codes.zero * codes.scale
    return float((low.half().float() - low).abs().max())


def _signed(codes: Codes) -> Tensor:
    zero = spread_groups(codes.zero, codes.values.shape[1], codes.group_size)
    return (codes.values.float() - zero).short()


def _per_block(t: Tensor, codes: Codes) -> Tensor:
    """(out, groups) → (out, blocks)."""
    return spread_groups(t, codes.values.shape[1], codes.group_size)[:, ::BLOCK].contiguous()
