"""Which tensors a checkpoint must hold: names, shapes and roles, from an architecture row and a config."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from .architectures import Architecture


@dataclass(frozen=True)
class Sizes:
    """The numbers that shapes are made of."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int

    @classmethod
    def of(cls, row: Architecture, config: Any) -> Sizes:
        width, heads = config.hidden_size, config.num_attention_heads
        return cls(
            width,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or width // heads,
            getattr(config, row.inner, None) or 4 * width,
            config.vocab_size,
        )

    def linear(self, role: str) -> tuple[int, int]:
        """(out, in) of a linear layer of the block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": q, "k": kv, "v": kv, "qkv": q + 2 * kv, "gate": self.inner, "up": self.inner}
        if role in ("o", "down"):
            return self.width, q if role == "o" else self.inner
        return rows.get(role, 2 * self.inner), self.width


@dataclass(frozen=True)
class Part:
    """One expected tensor. ``shape`` as stored in the file; ``role`` of a linear layer's weight, else None."""

    name: str
    shape: tuple[int, ...]
    role: str | None = None
    stage: int = -1
    optional: bool = False


def stages(row: Architecture) -> tuple[tuple[tuple[str, str], ...], ...]:
    """((role, module name), …) of every stage, in the order in which the forward needs them."""
    return row.attention, (("o", row.o),), row.mlp, (("down", row.down),)


def block_parts(row: Architecture, config: Any, prefix: str, i: int) -> Iterator[Part]:
    """Expected tensors of block ``i``. Biases are optional: configs do not say which layers have one."""
    sizes = Sizes.of(row, config)
    at = prefix + row.layer.format(i)
    for number, stage in enumerate(stages(row)):
        for role, name in stage:
            out, into = sizes.linear(role)
            yield Part(f"{at}{name}.weight", (into, out) if row.transposed else (out, into), role, number)
            yield Part(f"{at}{name}.bias", (out,), optional=True)
    for name in dict.fromkeys((row.norm_attention, row.norm_mlp, row.norm_attention_out, row.norm_mlp_out)):
        if name and row.setting(config, "norm_affine") is not False:
            yield from _norm(row, at + name, sizes.width)
    if row.setting(config, "qk_norm") and row.norm_q and row.norm_k:
        yield from _norm(row, at + row.norm_q, sizes.head_dim)
        yield from _norm(row, at + row.norm_k, sizes.head_dim)


def outer_parts(row: Architecture, config: Any, prefix: str, bare: bool) -> Iterator[Part]:
    """Expected tensors outside of the blocks. ``bare``: the file was saved without its head."""
    sizes = Sizes.of(row, config)
    embed = getattr(config, "word_embed_proj_dim", None) if row.project_in else None
    embed = embed or sizes.width
    yield Part(f"{prefix}{row.embed}.weight", (sizes.vocab, embed))
    if row.embed_positions:
        rows = config.max_position_embeddings + row.position_offset
        yield Part(f"{prefix}{row.embed_positions}.weight", (rows, sizes.width))
    if row.embed_types:
        yield Part(f"{prefix}{row.embed_types}.weight", (config.type_vocab_size, sizes.width))
    if row.embed_norm:
        yield from _norm(row, prefix + row.embed_norm, sizes.width)
    if embed != sizes.width:
        yield Part(f"{prefix}{row.project_in}.weight", (sizes.width, embed))
        yield Part(f"{prefix}{row.project_out}.weight", (embed, sizes.width))
    if has_final_norm(row, config) and row.setting(config, "norm_affine") is not False:
        yield from _norm(row, f"{prefix}{row.final_norm}", sizes.width)
    if row.head:
        tied = bool(getattr(config, "tie_word_embeddings", False))
        yield Part(f"{row.head}.weight", (sizes.vocab, embed), optional=tied or bare)
        yield Part(f"{row.head}.bias", (sizes.vocab,), optional=True)


def has_final_norm(row: Architecture, config: Any) -> bool:
    """Post-norm models end with the last block's norm; OPT can also switch its final norm off."""
    return bool(row.final_norm and row.setting(config, "pre_norm") and not row.setting(config, "final_norm_off"))


def prefix_of(row: Architecture, names: Collection[str]) -> str:
    """Which of the row's prefixes the file uses."""
    for prefix in row.prefixes:
        if f"{prefix}{row.embed}.weight" in names:
            return prefix
    return row.prefixes[0]


def _norm(row: Architecture, name: str, width: int) -> Iterator[Part]:
    yield Part(f"{name}.weight", (width,))
    if row.norm == "layer":
        yield Part(f"{name}.bias", (width,))
