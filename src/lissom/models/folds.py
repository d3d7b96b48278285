"""Where a factor per input can go instead of into the run: what makes the input of each stage, if it commutes.

A stage's linear layers read x. Multiplying column j of their weights by s_j leaves the block alone when x_j becomes x_j / s_j:

    stage      x comes from             1/s goes into
    q, k, v    a norm                   its gain (and bias)
    o          softmax(…) v             the rows of v; query heads that share v share s
    gate, up   a norm                   its gain (and bias)
    down       act(gate) · up           the rows of up
    down       relu(up)                 the rows of up: relu(u)/s = relu(u/s) for s > 0

A norm that also feeds the residual, or a GELU in between, cannot take it: :func:`source_of` says why.
Rotations of the hidden states (:func:`rotation_refusal`) need RMS norms, whose gains go into the layers behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .architectures import Architecture
from .forward import Block, Linear
from .layout import Sizes


@dataclass(frozen=True)
class Source:
    """What makes the input of ``readers``: a ``norm`` (tensor name without ".weight"), or ``rows`` of the layer ``writer``.

    ``share``: for o, how many query heads read each value head.
    """

    readers: tuple[Linear, ...]
    norm: str | None = None
    writer: str | None = None
    rows: Tensor | None = None
    share: int = 1


def source_of(row: Architecture, config: Any, at: str, linears: Sequence[Linear], stage: int) -> Source | str:
    """The source of a stage's input, or why a factor cannot go into it. ``at``: the block's prefix in tensor names."""
    here = tuple(la for la in linears if la.stage == stage)
    if stage in (0, 2):
        return _norm_source(row, config, at, linears, stage)
    s = Sizes.of(row, config)
    by_role = {la.role: la for la in linears}
    if stage == 1:
        if "v" in by_role:
            return Source(here, None, by_role["v"].name, torch.arange(s.kv_heads * s.head_dim), s.heads // s.kv_heads)
        return Source(here, None, by_role["qkv"].name, value_rows(row, s), s.heads // s.kv_heads)
    if "gate_up" in by_role:
        return Source(here, None, by_role["gate_up"].name, torch.arange(s.inner, 2 * s.inner))
    if "gate" in by_role or getattr(config, row.activation, row.activation) == "relu":
        return Source(here, None, by_role["up"].name, torch.arange(s.inner))
    return f"{here[0].role}: a GELU stands between it and {by_role['up'].role}"


def _norm_source(row: Architecture, config: Any, at: str, linears: Sequence[Linear], stage: int) -> Source | str:
    role = next(la.role for la in linears if la.stage == stage)
    if not row.setting(config, "pre_norm"):
        return f"{role}: its input is the residual stream itself (post-norm)"
    if row.setting(config, "residual_after_norm"):
        return f"{role}: its norm feeds the residual stream too"
    if row.setting(config, "norm_affine") is False:
        return f"{role}: its norm has no gain"
    shared = row.norm_attention == row.norm_mlp
    if shared and stage == 2:
        return f"{role}: its norm is that of the attention, whose step folds for both"
    readers = tuple(la for la in linears if la.stage == stage or (shared and la.stage == 2))
    return Source(readers, at + (row.norm_attention if stage == 0 else row.norm_mlp))


def value_rows(row: Architecture, s: Sizes) -> Tensor:
    """Rows of a fused qkv that are values, head after head."""
    if row.qkv == "heads":
        return torch.arange(3 * s.heads * s.head_dim).view(s.heads, 3, s.head_dim)[:, 2].flatten()
    start = (s.heads + s.kv_heads) * s.head_dim
    return torch.arange(start, start + s.kv_heads * s.head_dim)


def owners(source: Source, sizes: Sizes) -> Tensor | None:
    """(in,): inputs with equal numbers must have equal factors; None: all are free."""
    if source.share == 1:
        return None
    return (
        torch.arange(sizes.kv_heads * sizes.head_dim)
        .view(sizes.kv_heads, 1, -1)
        .expand(-1, source.share, -1)
        .reshape(-1)
    )


def shared_factor(source: Source, s: Tensor, sizes: Sizes) -> Tensor:
    """``s`` (in,) made equal (by its geometric mean) where query heads share a value head."""
    if source.share == 1:
        return s
    view = s.view(sizes.kv_heads, source.share, sizes.head_dim)
    return view.log().mean(1, keepdim=True).exp().expand_as(view).reshape(-1)


def fold(block: Block, source: Source, s: Tensor) -> None:
    """Multiply the readers' columns by ``s`` (in,), positive, and divide what makes their input."""
    for layer in source.readers:
        block.set_weight(layer.name, block.weight(layer.name) * s)
    if source.norm is not None:
        gain, bias = f"{source.norm}.weight", f"{source.norm}.bias"
        old = block.parameters[gain]
        block.set_parameter(gain, (1 + old) / s - 1 if block.row.norm == "rms+1" else old / s)
        if bias in block.parameters:
            block.set_parameter(bias, block.parameters[bias] / s)
        return
    assert source.writer is not None and source.rows is not None
    if source.share > 1:
        sizes = block.sizes
        s = s.view(sizes.kv_heads, source.share, sizes.head_dim)[:, 0].reshape(-1)
    for name, by in ((f"{source.writer}.weight", s[:, None]), (f"{source.writer}.bias", s)):
        if name in block.parameters:
            value = block.parameters[name].clone()
            value[source.rows] = value[source.rows] / by
            block.set_parameter(name, value)


def rotation_refusal(row: Architecture, config: Any) -> str | None:
    """Why the hidden states cannot be turned with everything fused into weights, or None."""
    if row.norm == "layer":
        return f"{row.name}: layer norms subtract a mean, which does not commute with a rotation"
    if row.norm_attention_out or row.norm_mlp_out:
        return f"{row.name}: norms on the branches have gains in the basis of the hidden states"
    if not row.setting(config, "pre_norm") or row.setting(config, "residual_after_norm"):
        return f"{row.name}: norms stand on the residual stream"
    if row.embed_norm or row.embed_positions or row.project_in:
        return f"{row.name}: the embedding is more than a table"
    return None
