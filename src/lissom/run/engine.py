"""The decoder in C++: from a checkpoint to an object that runs tokens.

One :meth:`Engine.step` runs any mix of prompt chunks and single tokens of many sequences through all layers;
no Python runs in between. Weights that the checkpoint stores as codes are packed as they are; everything else,
the embedding and the head is rounded to int8 in groups of 32 or 64 inputs when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core import CheckpointError, Codes, LissomError, NumericalError
from ..core.grid import spread_groups
from ..export import open_model
from ..kernels import Packed, extension
from ..models import Model
from ..models.forward import inverse_frequencies
from ..models.layout import Sizes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK = 32  # positions of a block of the cache, fixed in C++


class ContextError(LissomError):
    """A prompt or a generation does not fit the context, or the cache has no room for it now."""

    exit_code = 8


Compress = Callable[[str, Tensor], tuple[Codes, Tensor | None]]


def int8(weight: Tensor) -> Codes:
    """Round to nearest on the finest symmetric int8 grid that the kernels read well.

    The grid of ``Grid(8, symmetric=True)`` up to the rounding of scales, in a few passes over the weights: loading waits
    for it.
    """
    rows, columns = weight.shape
    group = 64 if columns % 64 == 0 else 32 if columns % 32 == 0 else columns
    blocks = weight.reshape(rows, -1, group)
    scale = (torch.linalg.vector_norm(blocks, float("inf"), dim=2) / 127).half().float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    if not bool(torch.isfinite(scale).all()):
        raise NumericalError("weights above 65504 · 127 or not finite cannot be rounded to int8")
    values = (blocks * inverse[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return Codes(values.reshape(rows, columns), scale, torch.full_like(scale, 128.0), 8, group)


@dataclass
class Layers:
    """How the layers were packed: ``forms[name]`` and the bytes that one token reads."""

    forms: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    rounded: list[str] = field(default_factory=list)  # layers without codes that were rounded to int8


def unsupported(model: Model) -> str | None:
    """Why the engine cannot run ``model``, or None."""
    config, row = model.config, model.architecture
    if row.name not in FAMILIES:
        return f"the runtime has no {row.name} blocks yet (it runs {', '.join(FAMILIES)})"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"the runtime knows gated SiLU only, not {config.hidden_act}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if row.window == "types" and len(kinds) > 1:
        return "layers with and without a sliding window in one model"
    form = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if form not in ("default", "linear", "llama3", "yarn"):
        return f"rotary embeddings of type {form!r} change with the length"
    if not model.has_head:
        return "the checkpoint has no head"
    if model.operators.turns:
        return "it needs a rotation at run time (quarot with online: true)"
    return None


class Engine:
    """A loaded model with its cache.

    ``context``: positions of the cache, shared by all ``slots`` (sequences in flight). ``threads``: None = all cores.
    ``cache_bits``: 16 or 8. ``compress``: called with (name, fp32 weight) for linear layers that have no codes.
    Raises :class:`CheckpointError` for architectures that it cannot run.
    """

    def __init__(
        self,
        source: str | Path | Model | Any,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        cache_bits: int = 16,
        compress: Compress | None = None,
    ):
        if extension is None:
            raise LissomError(
                "lissom was installed without its C++ kernels (no compiler was found): install one and run "
                "`pip install --force-reinstall --no-deps lissom`"
            )
        model = source if isinstance(source, Model) else Model(open_model(source))
        why = unsupported(model)
        if why:
            raise CheckpointError(f"{model.checkpoint.source} cannot be run: {why}. Use transformers, or export it")
        self.model, self.config = model, model.config
        self.sizes = Sizes.of(model.architecture, model.config)
        self.threads = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or 1
        limit = int(getattr(self.config, "max_position_embeddings", 2048))
        self.limit = limit  # positions of one sequence
        self.context = context or min(limit, 4096)
        self.slots = slots
        self.layers = Layers()
        self._keep: list[Packed] = []
        self._compress = compress
        self._core = extension.Engine(self._spec(cache_bits), self.threads)
        self._load()

    @property
    def vocabulary(self) -> int:
        return self.sizes.vocab

    @property
    def free_positions(self) -> int:
        """Positions that new sequences can still get."""
        return self._core.free_blocks * BLOCK

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads."""
        return self.layers.bytes

    def step(
        self,
        tokens: Sequence[int] | NDArray[np.int32],
        slots: Sequence[int] | int = 0,
        start: int | Sequence[int] = 0,
        want: str | Iterable[bool] = "last",
    ) -> NDArray[np.float32]:
        """Run ``tokens`` and return logits (wanted, vocabulary).

        ``slots`` and ``start``: one number for a single sequence (positions then count up), or one for each
        token. ``want``: "last", "all", or a flag for each token.
        """
        ids = np.asarray(tokens, np.int32)
        n = len(ids)
        where = np.full(n, slots, np.int32) if isinstance(slots, int) else np.asarray(slots, np.int32)
        at = np.arange(start, start + n, dtype=np.int32) if isinstance(start, int) else np.asarray(start, np.int32)
        if isinstance(want, str):
            flags = np.full(n, want == "all", np.uint8)
            flags[-1] = 1
        else:
            flags = np.fromiter(want, np.uint8, n)
        if n and int(at.max()) >= self.limit:
            raise ContextError(f"position {int(at.max())} is outside the model's context of {self.limit}")
        logits = np.empty((int(flags.sum()), self.vocabulary), np.float32)
        self._guard(self._core.step, ids, where, at, flags, logits)
        return logits

    def prefill(self, tokens: Sequence[int], slot: int = 0, start: int = 0, chunk: int = 128) -> NDArray[np.float32]:
        """Run a prompt in chunks; logits (vocabulary,) after its last token."""
        ids = np.asarray(tokens, np.int32)
        logits = np.empty((1, self.vocabulary), np.float32)
        for i in range(0, len(ids), chunk):
            part, last = ids[i : i + chunk], i + chunk >= len(ids)
            flags = np.zeros(len(part), bool)
            flags[-1] = last
            out = self.step(part, slot, start + i, flags)
            logits = out if last else logits
        return logits[0]

    def decode(
        self, token: int, position: int, count: int, sampling: Any, slot: int = 0, seed: int = 0, index: int = 0,
        seen: Sequence[int] = (), stops: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """Decode up to ``count`` tokens after ``token`` at ``position`` in C++, ending after one of ``stops``."""
        if position + count > self.limit:
            raise ContextError(f"{position + count} positions are outside the model's context of {self.limit}")
        return self._guard(
            self._core.decode, slot, int(token), position, count, sampling, seed, index, list(seen), list(stops)
        )

    def release(self, slot: int = 0) -> None:
        """Give the cache of ``slot`` back."""
        self._core.release(slot)

    # loading

    def _guard(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert extension is not None
        try:
            return function(*arguments)
        except extension.CacheFull as error:
            raise ContextError(
                f"the cache of {self.context} positions is full: raise `context`, or run fewer sequences at once"
            ) from error

    def _spec(self, cache_bits: int) -> Any:
        assert extension is not None
        s, spec = self.sizes, extension.Spec()
        frequency, scale = inverse_frequencies(self.config, None, s.head_dim, self.limit)
        self._frequency = frequency.float().flatten().tolist()
        spec.layers, spec.width, spec.heads, spec.kv_heads = self.model.blocks, s.width, s.heads, s.kv_heads
        spec.head_dim, spec.inner, spec.vocabulary = s.head_dim, s.inner, s.vocab
        spec.rotary, spec.rotary_scale = 2 * len(self._frequency), float(scale)
        spec.epsilon = float(getattr(self.config, self.model.architecture.eps))
        spec.attention_scale = s.head_dim**-0.5
        spec.window = _window(self.model) or 0
        spec.blocks, spec.slots, spec.cache_bits = -(-self.context // BLOCK) + self.slots - 1, self.slots, cache_bits
        return spec

    def _load(self) -> None:
        model, present = self.model, set(self.model.checkpoint.names())
        for i in range(model.blocks):
            packed, biases = {}, {}
            for linear in model.linears(i):
                packed[linear.role] = self._pack(linear.name)
                name = f"{linear.name}.bias"
                biases[linear.role] = self._vector(name) if name in present else None
            at = f"{model.prefix}{model.architecture.layer.format(i)}"
            if any(biases.get(role) is not None for role in ("gate", "up", "down")):
                raise CheckpointError(f"{model.checkpoint.source} cannot be run: block {i} has biases in its MLP")
            bias = []
            if any(biases[role] is not None for role in "qkv"):
                for role in "qkv":
                    value = biases[role]
                    bias += [0.0] * packed[role].rows if value is None else value
            row = model.architecture
            norms = [self._vector(f"{at}{name}.weight") for name in (row.norm_attention, row.norm_mlp)]
            head_norms = [self._vector(f"{at}{name}.weight") if name else [] for name in (row.norm_q, row.norm_k)]
            matrices = [packed[role].matrix for role in ("q", "k", "v", "o", "gate", "up", "down")]
            self._core.set_block(i, *matrices, *norms, *head_norms, bias, biases["o"] or [])
        embedding = self._packed(model.embed_name, self._tensor(model.embed_name), outer=True)
        head = embedding
        if not model.tied:
            assert model.head_name is not None
            head = self._packed(model.head_name, self._tensor(model.head_name), outer=True)
        self.layers.bytes += head.bytes
        final = self._vector(f"{model.prefix}{model.architecture.final_norm}.weight")
        self._core.set_outer(embedding.matrix, head.matrix, final, self._frequency)

    def _tensor(self, name: str) -> Tensor:
        return self.model.checkpoint.tensor(name).float()

    def _vector(self, name: str) -> list[float]:
        return self._tensor(name).tolist()

    def _pack(self, name: str) -> Packed:
        codes = _codes(self.model.checkpoint, name)
        if codes is not None:
            packed = Packed(codes, codes.values != spread_groups(codes.zero, codes.values.shape[1], codes.group_size))
            self._keep.append(packed)
            self.layers.forms[name] = str(packed.form)
        else:
            packed = self._packed(name, self._tensor(f"{name}.weight"))
        self.layers.bytes += packed.bytes
        return packed

    def _packed(self, name: str, weight: Tensor, outer: bool = False) -> Packed:
        if self._compress is not None and not outer:
            codes, mask = self._compress(name, weight)
        else:
            codes, mask = int8(weight), None
            self.layers.rounded.append(name)
            sparse = weight == 0
            if float(sparse.float().mean()) > 0.5:
                mask = ~sparse
        packed = Packed(codes, mask)
        self._keep.append(packed)
        self.layers.forms[name] = str(packed.form)
        return packed


def _codes(checkpoint: Any, name: str) -> Codes | None:
    """The codes of the layer ``name`` where the checkpoint stores codes that the kernels can read."""
    read = getattr(checkpoint, "layer", None)
    codes = read(name).codes if read is not None else None
    return codes if codes is not None and _fits(codes) else None


def _fits(codes: Codes) -> bool:
    return codes.group_size >= codes.values.shape[1] or codes.group_size % 32 == 0


def _window(model: Model) -> int | None:
    row, config = model.architecture, model.config
    if row.window == "all":
        return getattr(config, "sliding_window", None)
    if row.window == "types" and set(getattr(config, "layer_types", None) or []) == {"sliding_attention"}:
        return config.sliding_window
    return None
