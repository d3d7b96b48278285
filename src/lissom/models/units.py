"""Which rows and columns belong to a head or a neuron, and blocks and configs without some of them.

Everything follows from the architecture row: the layout of fused layers, where the config keeps each size, and whether
transformers can load what is left (:func:`refusal`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import RecipeError, Units
from .architectures import Architecture
from .forward import Block, Linear
from .layout import Sizes

KINDS = ("heads", "neurons")  # of a block; "channels" of the hidden state are cut in all blocks at once: see .channels
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def refusal(row: Architecture, config: Any, kind: str) -> str | None:
    """Why units of this kind cannot be removed so that transformers loads the result, or None.

    Heads need a config with a head size of its own: elsewhere it is width / heads, and fewer heads would change it.
    ALiBi's slopes depend on the number of heads.
    """
    if kind == "heads":
        if row.position == "alibi":
            return f"{row.name}: the slopes of its positions depend on the number of heads"
        if not row.free_heads:
            return f"{row.name}: its config has no head size of its own, so fewer heads would mean other heads"
    elif kind == "neurons" and not hasattr(config, row.inner):
        return f"{row.name}: its config has no size of the MLP of its own"
    elif kind == "channels":
        if row.norm == "layer":
            return f"{row.name}: its norms subtract the mean over all channels, so fewer would change the others"
        if not row.free_heads:
            return f"{row.name}: its config has no head size of its own, so a smaller width would mean smaller heads"
    return None


def units_of(row: Architecture, config: Any, linears: Sequence[Linear], kind: str) -> Units:
    """The units of one block; ``linears`` as of :meth:`Model.linears`."""
    s = Sizes.of(row, config)
    by_role = {layer.role: layer.name for layer in linears}
    if kind == "neurons":
        each = torch.arange(s.inner)[:, None]
        rows = {by_role[r]: each for r in ("gate", "up") if r in by_role}
        if "gate_up" in by_role:
            rows[by_role["gate_up"]] = torch.cat((each, each + s.inner), 1)
        columns = {by_role["down"]: each}
    elif kind == "heads":
        per, d = s.heads // s.kv_heads, s.head_dim
        q = torch.arange(s.heads * d).view(s.kv_heads, per * d)
        kv = torch.arange(s.kv_heads * d).view(s.kv_heads, d)
        if "qkv" not in by_role:
            rows = {by_role["q"]: q, by_role["k"]: kv, by_role["v"]: kv}
        elif row.qkv == "heads":
            rows = {by_role["qkv"]: torch.arange(3 * s.heads * d).view(s.heads, 3 * d)}
        else:
            at = s.heads * d
            rows = {by_role["qkv"]: torch.cat((q, at + kv, at + s.kv_heads * d + kv), 1)}
        columns = {by_role["o"]: q}
    elif kind == "channels":
        each = torch.arange(s.width)[:, None]
        rows = {by_role[r]: each for r in ("o", "down")}
        columns = {n: each for r, n in by_role.items() if r not in ("o", "down")}
    else:
        raise ValueError(f"kind of units must be one of {', '.join(KINDS)}, channels, not {kind!r}")
    shape = {layer.name: (layer.rows, layer.columns) for layer in linears}
    size = sum(i.shape[1] * shape[n][1] for n, i in rows.items()) + sum(
        i.shape[1] * shape[n][0] for n, i in columns.items()
    )
    return Units(kind, rows, columns, size)


def masked(parameters: Mapping[str, Tensor], units: Units, keep: Tensor) -> dict[str, Tensor]:
    """Tensors of a block with the units outside of ``keep`` (sorted indices) set to zero, same shapes."""
    out = dict(parameters)
    gone = torch.ones(units.count, dtype=torch.bool)
    gone[keep] = False
    for name, index in units.rows.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in out:
                out[key] = out[key].index_fill(0, index[gone].flatten(), 0.0)
    for name, index in units.columns.items():
        out[f"{name}.weight"] = out[f"{name}.weight"].index_fill(1, index[gone].flatten(), 0.0)
    return out


def sliced(parameters: Mapping[str, Tensor], units: Units, keep: Tensor) -> dict[str, Tensor]:
    """Tensors of a block without the units outside of ``keep``; order is kept. Weights are (out, in)."""
    out = dict(parameters)
    for name, index in units.rows.items():
        rows = index[keep].flatten().sort().values
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in out:
                out[key] = out[key][rows].contiguous()
    for name, index in units.columns.items():
        out[f"{name}.weight"] = out[f"{name}.weight"][:, index[keep].flatten().sort().values].contiguous()
    return out


def smaller_config(
    row: Architecture,
    config: Any,
    heads: int | None,
    neurons: int | None,
    blocks: Sequence[int],
    channels: int | None = None,
) -> Any:
    """A copy of the config with so many KV groups and neurons in every block, only the given ``blocks``, and so many
    channels of the hidden state."""
    s = Sizes.of(row, config)
    new = copy.deepcopy(config)
    if heads is not None and heads != s.kv_heads:
        if not 1 <= heads <= s.kv_heads:
            raise RecipeError(f"between 1 and {s.kv_heads} KV heads must remain, not {heads}")
        new.head_dim = s.head_dim
        new.num_attention_heads = heads * (s.heads // s.kv_heads)
        if getattr(config, "num_key_value_heads", None) is not None:
            new.num_key_value_heads = heads
    if channels is not None and channels != s.width:
        if not 1 <= channels <= s.width:
            raise RecipeError(f"between 1 and {s.width} channels must remain, not {channels}")
        new.head_dim, new.hidden_size = s.head_dim, channels
        if not row.setting(config, "qk_norm"):  # whose norms, over a head, have the same ε and do not change
            setattr(new, row.eps, getattr(config, row.eps) * s.width / channels)
        if getattr(new, row.inner, None) is None:
            setattr(new, row.inner, s.inner)
    if neurons is not None and neurons != s.inner:
        if not 1 <= neurons <= s.inner:
            raise RecipeError(f"between 1 and {s.inner} neurons must remain, not {neurons}")
        setattr(new, row.inner, neurons)
    if len(blocks) != config.num_hidden_layers:
        if not blocks:
            raise RecipeError("at least one block must remain")
        for name in _PER_LAYER:
            old = getattr(config, name, None)
            if isinstance(old, list) and len(old) == config.num_hidden_layers:
                setattr(new, name, [old[i] for i in blocks])
        new.num_hidden_layers = len(blocks)
    return new


def smaller_block(block: Block, chosen: Mapping[str, tuple[Units, Tensor]]) -> dict[str, Tensor]:
    """Tensors of ``block`` without what is not chosen, {kind: (units, kept indices)}."""
    parameters: dict[str, Tensor] = dict(block.parameters)
    for units, keep in chosen.values():
        parameters = sliced(parameters, units, keep)
    return parameters
