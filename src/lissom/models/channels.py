"""Models without some channels of the hidden state: everything that reads or writes them loses the same columns and rows.

An RMS norm over fewer channels divides by a smaller count. With n of N channels left, all others zero,

    rms over n  =  √(N / n) · rms over N     ⇒     norm weights · √(N / n) give what the masked model gives

with ε · N / n in the config (where heads have norms of their own with the same ε it stays, and equality is up to ε). Where
the embedding is scaled by √width it is multiplied by √(N / n) too, and a head tied to it then needs no factor in the norm. LayerNorm also subtracts a mean over all channels: see :func:`.units.refusal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .architectures import Architecture
from .forward import Block
from .units import sliced, units_of


def narrower_block(block: Block, keep: Tensor) -> dict[str, Tensor]:
    """Tensors of ``block`` with the channels ``keep`` (sorted indices) only; weights are (out, in)."""
    out = sliced(block.parameters, units_of(block.row, block.config, block.linears, "channels"), keep)
    row, factor = block.row, math.sqrt(block.sizes.width / len(keep))
    for name in (row.norm_attention, row.norm_mlp, row.norm_attention_out, row.norm_mlp_out):
        key = f"{block.prefix}{name}.weight"
        if name and len(block.parameters[key]) == len(out[key]):  # a norm that two places share is cut once
            out[key] = _scaled(row, out[key][keep], factor)
    return out


def narrower_outer(
    row: Architecture, config: Any, prefix: str, outer: Mapping[str, Tensor], keep: Tensor
) -> dict[str, Tensor]:
    """Tensors outside of the blocks with the channels ``keep`` only, in fp32 where they change; others as they are."""
    factor = math.sqrt(config.hidden_size / len(keep))
    embed, head = f"{prefix}{row.embed}.weight", f"{row.head}.weight"
    tied = bool(getattr(config, "tie_word_embeddings", False)) or head not in outer
    out = dict(outer)
    for name in (embed, head):
        if name in out:
            out[name] = out[name].float()[:, keep].contiguous()
    if row.embed_scale:
        out[embed] = out[embed] * factor
        if tied and head in out:
            out[head] = out[embed]
    norm = f"{prefix}{row.final_norm}.weight"
    if norm in out:
        out[norm] = _scaled(row, out[norm].float()[keep], 1.0 if row.embed_scale and tied else factor)
    return out


def _scaled(row: Architecture, weight: Tensor, factor: float) -> Tensor:
    return ((1 + weight) * factor - 1 if row.norm == "rms+1" else weight * factor).contiguous()
