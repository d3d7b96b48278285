"""The decoder in C++, driven from Python one step at a time.

One :meth:`Engine.step` runs any mix of prompt chunks and single tokens of many sequences through all layers; no Python runs
in between. Where the weights come from is the business of :mod:`lissom.run.load` (a checkpoint, with torch) and
:mod:`lissom.run.image` (a mapped file, without).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import CheckpointError, LissomError
from ..kernels.native import extension, isa
from .parts import ROLES, VECTORS, Layers, Parts

if TYPE_CHECKING:
    from .load import Compress

BLOCK = 32  # positions of a block of the cache, fixed in C++
RETURN = 64  # positions that stay in the cache behind a sliding window, fixed in C++: what a draft may take back
CHUNK = 128  # tokens of a prompt that one step reads


class ContextError(LissomError):
    """A prompt or a generation does not fit the context, or the cache has no room for it now."""

    exit_code = 8


class Engine:
    """A loaded model with its cache.

    ``source``: :class:`Parts` (which engines can share), a ``Model``, or whatever ``open_model`` takes. ``context``:
    positions of the cache, shared by all ``slots`` (sequences in flight). ``threads``: None = all cores.
    ``cache_bits``: 16, 8 or 4; None = what the checkpoint records, else 16. ``compress`` and ``outer_bits``: see :func:`lissom.run.load.load`.
    Raises :class:`CheckpointError` for architectures that it cannot run.
    """

    def __init__(
        self,
        source: Any,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        cache_bits: int | None = None,
        compress: Compress | None = None,
        outer_bits: int = 8,
    ):
        if extension is None:
            raise LissomError(
                "lissom was installed without its C++ kernels (no compiler was found): install one and run "
                "`pip install --force-reinstall --no-deps lissom`"
            )
        if cache_bits not in (None, 4, 8, 16):
            raise LissomError(f"the cache has 16, 8 or 4 bits, not {cache_bits}")
        if not isinstance(source, Parts):
            from .load import load

            source = load(source, compress, outer_bits)
        self.parts: Parts = source
        self.isa = isa()
        self.cache_bits = cache_bits or _cache_bits(source)
        self.threads = threads or _cores()
        self.limit = source.limit  # positions of one sequence
        self.context = context or min(self.limit, 4096)
        self.slots = slots
        spec = extension.Spec()
        for name, value in source.sizes.items():
            setattr(spec, name, value)
        spec.blocks, spec.slots, spec.cache_bits = -(-self.context // BLOCK) + slots - 1, slots, self.cache_bits
        self._core = extension.Engine(spec, self.threads)
        for i, block in enumerate(source.blocks):
            vectors = (block.vectors[name] for name in VECTORS)
            self._core.set_block(i, *(block.weights[role] for role in ROLES), *vectors)
        for i, grids in enumerate(source.recorded.inputs):
            self._core.set_grids(i, [bits for bits, _ in grids], [scale for _, scale in grids])
        self._core.set_outer(source.embedding, source.head, source.norm, source.frequency)

    @property
    def layers(self) -> Layers:
        return self.parts.layers

    @property
    def vocabulary(self) -> int:
        return int(self.parts.sizes["vocabulary"])

    @property
    def free_positions(self) -> int:
        """Positions that new sequences can still get."""
        return self._core.free_blocks * BLOCK

    @property
    def window(self) -> int:
        """Positions that a token sees, 0 = all."""
        return int(self.parts.sizes["window"])

    def blocks_for(self, positions: int) -> int:
        """Blocks of the cache that a sequence of ``positions`` holds at most: a sliding window gives the old ones back."""
        whole = -(-positions // BLOCK)
        return min(whole, -(-(self.window + RETURN + CHUNK) // BLOCK) + 2) if self.window else whole

    @property
    def longest(self) -> int:
        """Positions that one sequence may have: those of the model, and of the cache unless a sliding window fits into it."""
        return self.limit if self.blocks_for(self.limit) * BLOCK <= self.context else min(self.limit, self.context)

    @property
    def cache_bytes(self) -> int:
        return self._core.cache_bytes

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

    def prefill(self, tokens: Sequence[int], slot: int = 0, start: int = 0, chunk: int = CHUNK) -> NDArray[np.float32]:
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

    def _guard(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert extension is not None
        try:
            return function(*arguments)
        except extension.CacheFull as error:
            raise ContextError(
                f"the cache of {self.context} positions is full: raise `context`, or run fewer sequences at once"
            ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_bits(parts: Parts) -> int:
    recorded = parts.recorded
    if recorded.cache_lacks:
        raise CheckpointError(
            f"{parts.source} was made for {recorded.cache_lacks}, which the engine does not have (its caches have 16, 8 or 4 bits "
            "and grids of a token): give cache_bits (--cache-bits) to run it with one of those instead; `lissom evaluate` "
            "measures it as recorded"
        )
    return recorded.cache_bits or 16
