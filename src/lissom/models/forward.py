"""The forward pass of one transformer block, written once for all architectures, in stages.

:func:`_steps` is straight-line code that stops at every stage with the stage's input in ``state["x"]``. All tensors that
live across a stop are in ``state`` and nowhere else, so a driver may move them to disk and back between stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import HOST, CheckpointError, on
from .architectures import Architecture
from .layout import Sizes, stages
from .operators import BlockOperators

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    ``name``: module name as in the file (``model.layers.0.mlp.up_proj``); ``role``: q, k, v, qkv, o, gate, up, gate_up or
    down; ``stage``: index into :attr:`Block.stages`; ``rows`` = out, ``columns`` = in; ``block``: number of the block.
    """

    name: str
    role: str
    stage: int
    rows: int
    columns: int
    block: int


class Block:
    """One block in memory: fp32 weights, (out, in) whatever the layout of the file.

    ``parameters`` maps tensor names as in the file (``….weight``, ``….bias``) to tensors in that layout; they may require
    gradients. ``stages``: the linear layers of each stage, which share their input.
    """

    def __init__(
        self, row: Architecture, config: Any, number: int, prefix: str, linears: tuple[Linear, ...],
        parameters: dict[str, Tensor],
    ):  # fmt: skip
        self.row, self.config, self.number = row, config, number
        self.linears = linears
        self.parameters = parameters
        self.stages = tuple(tuple(la for la in linears if la.stage == s) for s in range(len(stages(row))))
        self.sizes = Sizes.of(row, config)
        self.prefix = self._at = prefix + row.layer.format(number)
        self.observe: Callable[[str, Tensor], None] | None = None  # sees (layer name, output) of every linear layer
        self.operators: BlockOperators | None = None  # what the run does beside the weights

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return next(iter(self.parameters.values())).device

    def weight(self, name: str) -> Tensor:
        """Weight (out, in) of the linear layer ``name``."""
        return self.parameters[f"{name}.weight"]

    def bias(self, name: str) -> Tensor | None:
        """Bias (out,) of the linear layer ``name``, or None."""
        return self.parameters.get(f"{name}.bias")

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace the weight of a linear layer; ``weight: (out, in)``."""
        self.set_parameter(f"{name}.weight", weight)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace any tensor of the block, under its name in the file, on its device; the shape must stay the same."""
        old = self.parameters[name]
        if old.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(old.shape)}, not {tuple(value.shape)}")
        self.parameters[name] = value.to(old.device)

    def tensors(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Every tensor, but for those in ``without``, under the name and in the layout of the file, fp32, detached and on the host."""
        turned = {f"{la.name}.weight" for la in self.linears} if self.row.transposed else set()
        wanted = {k: v for k, v in self.parameters.items() if k not in without}
        return {k: (v.T.contiguous() if k in turned else v).detach().to(HOST) for k, v in wanted.items()}

    def start(self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Run:
        """Begin a staged forward over ``hidden: (batch, tokens, width)`` from anywhere, on the block's device.

        ``position_ids``: (batch, tokens) where positions are not 0 … tokens − 1. ``mask``: (batch, tokens) bool, False
        for padding, which no token attends to.
        """
        return Run(self, hidden, position_ids, mask)

    def forward(self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The whole block at once, (batch, tokens, width) → the same shape, where ``hidden`` is."""
        run = self.start(hidden, position_ids, mask)
        for _ in self.stages:
            run.advance()
        return run.output().to(hidden.device)

    # what _steps needs, by relative names

    def _get(self, name: str) -> Tensor | None:
        return self.parameters.get(self._at + name)

    def _apply(self, x: Tensor, module: str) -> Tensor:
        out = F.linear(x, self.parameters[f"{self._at}{module}.weight"], self._get(f"{module}.bias"))
        if self.observe is not None:
            self.observe(self._at + module, out)
        return out

    def _norm(self, x: Tensor, module: str | None) -> Tensor:
        if module is None:
            return x
        weight, bias = self._get(f"{module}.weight"), self._get(f"{module}.bias")
        return normalise(self.row, self.config, x, weight, bias)

    def _window(self) -> int | None:
        if self.row.window == "none" or (self.row.window == "types" and self._type() != "sliding_attention"):
            return None
        return getattr(self.config, "sliding_window", None)

    def _type(self) -> str | None:
        kinds = getattr(self.config, "layer_types", None)
        return kinds[self.number] if kinds else None

    def _rotary(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin, broadcastable to (batch, heads, tokens, rotary / 2), or None for layers without positions."""
        no_rope = getattr(self.config, "no_rope_layers", None)  # SmolLM3: 0 = no rotary embedding
        if self.row.position != "rotary" or (no_rope and not no_rope[self.number]):
            return None
        longest = tokens if position_ids is None else int(position_ids.max()) + 1
        kind = self._type() if self.row.rope_by_type else None
        frequencies, scale = inverse_frequencies(self.config, kind, self.sizes.head_dim, longest)
        positions = torch.arange(tokens)[None] if position_ids is None else position_ids
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, heads, tokens, head_dim), k and v (batch, kv_heads, tokens, head_dim) from the first stage's input,
        before positions are applied."""
        return self._heads([self._apply(x, name) for _, name in self.row.attention])

    def _heads(self, raw: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the attention's linear layers → q, k, v, each (batch, heads, tokens, head_dim)."""
        s = self.sizes
        batch, tokens, _ = raw[0].shape
        if len(raw) == 1 and self.row.qkv == "heads":
            q, k, v = raw[0].view(batch, tokens, s.heads, 3, s.head_dim).unbind(3)
        else:
            if len(raw) == 1:
                kv = s.kv_heads * s.head_dim
                raw = list(raw[0].split((s.heads * s.head_dim, kv, kv), dim=-1))
            q, k, v = (t.unflatten(-1, (-1, s.head_dim)) for t in raw)
        if self.row.setting(self.config, "qk_norm"):
            q, k = self._norm(q, self.row.norm_q), self._norm(k, self.row.norm_k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, raw: list[Tensor], position_ids: Tensor | None, padding: Tensor | None) -> Tensor:
        """Attention over all tokens, (batch, tokens, heads · head_dim)."""
        row, s = self.row, self.sizes
        q, k, v = self._heads(raw)
        tokens = q.shape[2]
        rotary = self._rotary(tokens, position_ids)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        kept = None
        if self.operators is not None:
            q, k = self.operators.heads(q, k)
            kept = self.operators.cached(k, v)
            if kept is not None:
                k, v = kept[0].old, kept[1].old
                if all(c.fresh is None for c in kept):
                    kept = None
        if s.kv_heads != s.heads:
            k, v = (t.repeat_interleave(s.heads // s.kv_heads, dim=1) for t in (k, v))
            kept = [c.repeated(s.heads // s.kv_heads) for c in kept] if kept else None
        scale = (getattr(self.config, row.query_scale) if row.query_scale else s.head_dim) ** -0.5
        if row.setting(self.config, "scale_by_layer"):
            scale /= self.number + 1
        cap = getattr(self.config, row.attention_cap, None) if row.attention_cap else None
        window = self._window()
        plain = padding is None and row.position != "alibi" and (window is None or window >= tokens)
        if plain and cap is None and not kept:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=row.causal, scale=scale)
        else:
            bias = attention_bias(tokens, row.causal, window, padding)
            if row.position == "alibi":
                bias = bias + alibi_slopes(s.heads)[:, None, None] * torch.arange(tokens)
            if cap is None and not kept:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            else:
                scores = (kept[0].scores(q) if kept else q @ k.transpose(-1, -2)) * scale
                scores = scores if cap is None else torch.tanh(scores / cap) * cap
                p = torch.softmax(scores + bias, dim=-1)
                out = kept[1].weighted(p) if kept else p @ v
        return out.transpose(1, 2).flatten(2)

    def _enter(self, state: dict[str, Any], stage: int, x: Tensor) -> None:
        """Stop before ``stage`` with its input."""
        state["x"] = x if self.operators is None else self.operators.incoming(stage, x)

    def _steps(self, state: dict[str, Any], position_ids: Tensor | None, mask: Tensor | None) -> Iterator[None]:
        row, config = self.row, self.config
        pre = bool(row.setting(config, "pre_norm"))
        parallel = bool(row.setting(config, "parallel"))
        after_norm = bool(row.setting(config, "residual_after_norm"))
        activation = activation_of(row, config)

        x = self._norm(state["hidden"], row.norm_attention) if pre else state["hidden"]
        if after_norm:
            state["hidden"] = x
        self._enter(state, 0, x)
        del x
        yield

        raw = [self._apply(state["x"], name) for _, name in row.attention]
        self._enter(state, 1, self._attend(raw, position_ids, mask))
        del raw
        yield

        branch = self._norm(self._apply(state["x"], row.o), row.norm_attention_out)
        total = state["hidden"] + branch
        del branch
        if parallel:
            x = self._norm(state["hidden"], row.norm_mlp)
        elif pre:
            x = self._norm(total, row.norm_mlp)
        else:
            x = total = self._norm(total, row.norm_attention)
        state["hidden"] = x if after_norm else total
        self._enter(state, 2, x)
        del total, x
        yield

        raw = [self._apply(state["x"], name) for _, name in row.mlp]
        if row.mlp[0][0] == "gate_up":
            raw = list(raw[0].chunk(2, dim=-1))
        self._enter(state, 3, activation(raw[0]) * raw[1] if len(raw) == 2 else activation(raw[0]))
        del raw
        yield

        branch = self._norm(self._apply(state.pop("x"), row.down), row.norm_mlp_out)
        total = state["hidden"] + branch
        state["hidden"] = total if pre else self._norm(total, row.norm_mlp)


class Run:
    """One forward over one batch: ``input`` → ``advance`` for each stage, then ``output``.

    ``state`` holds every live tensor between the calls.
    """

    def __init__(self, block: Block, hidden: Tensor, position_ids: Tensor | None, mask: Tensor | None):
        self._device = device = block.device
        self.state: dict[str, Any] = {"hidden": hidden.to(device)}
        self._left = len(block.stages)
        self._steps = block._steps(self.state, *(None if t is None else t.to(device) for t in (position_ids, mask)))
        with on(device):
            next(self._steps)

    def input(self) -> Tensor:
        """What all linear layers of the current stage are applied to, (batch, tokens, in)."""
        if not self._left:
            raise ValueError("the block is done: call output()")
        return self.state["x"]

    def advance(self) -> None:
        """Apply the stage's linear layers as they are now, and go on to the next stage."""
        if not self._left:
            raise ValueError("the block is done: call output()")
        self._left -= 1
        with on(self._device):
            next(self._steps, None)

    def output(self) -> Tensor:
        """Hidden states after the block, (batch, tokens, width)."""
        if self._left:
            raise ValueError(f"{self._left} stages are still to come: call advance()")
        return self.state["hidden"]


def normalise(row: Architecture, config: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm, RMSNorm, or RMSNorm with weight 1 + w, over the last dimension."""
    eps = getattr(config, row.eps, 1e-5)
    if row.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert weight is not None
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * (1 + weight) if row.norm == "rms+1" else x * weight


def activation_of(row: Architecture, config: Any) -> Callable[[Tensor], Tensor]:
    """The MLP's activation; raises :class:`CheckpointError` for an unknown one."""
    name = getattr(config, row.activation, row.activation)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"unknown activation {name!r} in the config; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def inverse_frequencies(config: Any, kind: str | None, head_dim: int, tokens: int) -> tuple[Tensor, float]:
    """Inverse frequencies (rotary / 2,) and the factor of cos and sin, for sequences of ``tokens``.

    ``kind``: the layer type, where the config has one set of rotary parameters for each.
    """
    rope = config.rope_parameters[kind] if kind else config.rope_parameters
    form = rope.get("rope_type", "default")
    if form != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # slow to import

        extra = {"layer_type": kind} if kind else {}
        frequencies, scale = ROPE_INIT_FUNCTIONS[form](config, None, seq_len=tokens, **extra)
        return frequencies, float(scale)
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / (rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary)), 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2 · cos.shape[-1] entries of each head; pairs are (i, i + half)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attention_bias(tokens: int, causal: bool, window: int | None, padding: Tensor | None) -> Tensor:
    """0 where a query (row) may see a key (column), else the lowest float; broadcastable to (batch, heads, q, k).

    A window of W sees W keys, the query's own included.
    """
    at = torch.arange(tokens)
    distance = at[:, None] - at
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None, None]
    if padding is not None:
        seen = seen & padding.bool()[:, None, None, :]
    # finite, so that rows of padding without any key give numbers and not NaN
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min / 2)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (Press et al. 2021, §3), (heads,): 2^(−8 i / n), odd steps of 2n for heads beyond a power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)
