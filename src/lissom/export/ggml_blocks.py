"""ggml's block formats, written from lissom's own codes where the grids match.

Every block holds 32 neighbours of a row; ``d`` and ``m`` are float16, ``u`` unsigned codes, ``e`` an exponent:

======  =====================  ==================  ==========================================================
type    weight                 bits a weight       exact for ``w = (code − zero) · scale`` when
======  =====================  ==================  ==========================================================
Q4_0    (u − 8) · d            4.5                 code − zero in −8 … 7: symmetric up to 4 bits, any 2–3 bits
Q5_0    (u − 16) · d           5.5                 code − zero in −16 … 15: any 4 bits, symmetric 5 bits
Q8_0    u · d (signed)         8.5                 code − zero in −128 … 127: any 7 bits, symmetric 8 bits
Q4_1    u · d + m              5                   of codes only up to the rounding of m = −zero · scale to float16;
                                                   exact for ``w = code · scale + offset`` (HQQ) up to 4 bits
MXFP4   t[u] · 2^(e − 128)     4.25                the codebook MXFP4 (t: FP4's values, doubled)
======  =====================  ==================  ==========================================================

and a scale spans whole blocks. Layout of the bytes: llama.cpp, ggml-quants.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import Affine, Codes, FormatError, Levels, Stored
from ..core.grid import spread_groups

BLOCK = 32
_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
QUANTIZED = (*_RANGES, "Q4_1", "MXFP4")


def blocks_fit(columns: int, group_size: int) -> bool:
    """Whether no block of a row spans two groups, and blocks fill the rows."""
    return columns % BLOCK == 0 and (group_size >= columns or group_size % BLOCK == 0)


def exact_types(codes: Codes | Stored) -> list[str]:
    """The block formats that hold ``codes`` exactly, smallest first."""
    if isinstance(codes, Affine):
        return ["Q4_1"] if codes.bits <= 4 and blocks_fit(codes.values.shape[1], codes.group_size) else []
    if isinstance(codes, Levels):
        whole = codes.name == "mxfp4" and codes.group_size == BLOCK and codes.values.shape[1] % BLOCK == 0
        return ["MXFP4"] if whole else []
    if not isinstance(codes, Codes):
        return []
    if not blocks_fit(codes.values.shape[1], codes.group_size):
        return []
    signed = _signed(codes)
    low, high = int(signed.min()), int(signed.max())
    return [name for name, (least, most) in _RANGES.items() if least <= low and high <= most]


def encode_blocks(codes: Codes | Affine | Levels, kind: str) -> NDArray[np.uint8]:
    """Rows of blocks as bytes, (out, bytes a row). ``kind``: one of :func:`exact_types`, or Q4_1 for codes up to 4 bits."""
    rows = codes.values.shape[0]
    if isinstance(codes, Levels):
        return _mxfp4(codes)
    scale = _per_block(codes.scale, codes).half().numpy()
    fields: list[NDArray] = [scale.reshape(rows, -1, 1).view(np.uint8)]
    if kind == "Q4_1":
        low = _per_block(codes.offset if isinstance(codes, Affine) else -codes.zero * codes.scale, codes).half().numpy()
        fields.append(low.reshape(rows, -1, 1).view(np.uint8))
        u = codes.values.numpy().reshape(rows, -1, BLOCK)
    elif isinstance(codes, Affine):
        raise FormatError(f"{kind} has no offset")
    else:
        u = (_signed(codes).numpy() - _RANGES[kind][0]).astype(np.uint8).reshape(rows, -1, BLOCK)
    if kind == "Q5_0":
        fields.append(np.packbits(u >> 4, axis=-1, bitorder="little"))
    if kind == "Q8_0":
        fields.append((u.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        fields.append((u[..., :16] & np.uint8(15)) | (u[..., 16:] & np.uint8(15)) << np.uint8(4))
    return np.concatenate(fields, axis=-1).reshape(rows, -1)


def _mxfp4(form: Levels) -> NDArray[np.uint8]:
    """One exponent a block, then sign and magnitude of FP4 in four bits each."""
    rows = form.values.shape[0]
    exponent = torch.log2(form.scale).round().to(torch.int16) + 127
    levels = form.table[0]
    order = levels.abs().unique(sorted=True)  # 0, 0.5, 1, 1.5, 2, 3, 4, 6
    nibble = torch.searchsorted(order, levels.abs()) + 8 * (levels < 0)
    u = nibble.to(torch.uint8)[form.values.long()].numpy().reshape(rows, -1, BLOCK)
    pairs = u[..., :16] | u[..., 16:] << np.uint8(4)
    return np.concatenate([exponent.to(torch.uint8).numpy()[..., None], pairs], axis=-1).reshape(rows, -1)


def q4_1_error(codes: Codes) -> float:
    """Largest difference that Q4_1's float16 minimum makes to a weight."""
    low = -codes.zero * codes.scale
    return float((low.half().float() - low).abs().max())


def _signed(codes: Codes) -> Tensor:
    zero = spread_groups(codes.zero, codes.values.shape[1], codes.group_size)
    return (codes.values.float() - zero).short()


def _per_block(t: Tensor, codes: Codes | Affine) -> Tensor:
    """(out, groups) → (out, blocks)."""
    return spread_groups(t, codes.values.shape[1], codes.group_size)[:, ::BLOCK].contiguous()
