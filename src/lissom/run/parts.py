"""What an engine is made of: sizes, packed weights and a tokenizer, wherever they come from. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..kernels.native import extension

ALIGN = 64
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Layers:
    """How the layers were packed: ``forms[name]`` and the bytes that one token reads."""

    forms: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    rounded: list[str] = field(default_factory=list)  # layers without codes that were rounded when they were loaded

    def add(self, other: Layers) -> None:
        self.forms |= other.forms
        self.bytes += other.bytes
        self.rounded += other.rounded


@dataclass
class BlockParts:
    """One block. ``weights[role]``: packed matrices of the extension; ``vectors``: fp32 values, [] where there are none.

    The vectors are ``norm1``, ``norm2``, ``q_norm``, ``k_norm``, ``bias`` (of q, k and v together) and ``o_bias``.
    """

    weights: dict[str, Any]
    vectors: dict[str, list[float]]


VECTORS = ("norm1", "norm2", "q_norm", "k_norm", "bias", "o_bias")


@dataclass
class Recorded:
    """What a checkpoint says about a run beside its weights (``lissom_operators``), as far as the engine goes.

    ``inputs[block][stage]``: bits (0: not rounded) and scale (0: of each token) of the inputs of q k v, o, gate up, down; empty
    when none are rounded. ``cache_bits``: the engine's cache that has the recorded bits, None when nothing is recorded or
    the engine has no such cache; then ``cache_lacks`` says what was recorded.
    """

    inputs: list[list[tuple[int, float]]] = field(default_factory=list)
    cache_bits: int | None = None
    cache_lacks: str = ""


@dataclass
class Parts:
    """A model that is ready to run; several engines can share one.

    ``sizes``: the numbers of the extension's ``Spec`` that belong to the model. ``limit``: positions of one sequence.
    ``ends`` and ``tokenizer`` make the tokens that end a text and the tokenizer when they are needed. ``model``: the
    :class:`~lissom.models.Model` that the weights came from, None when they were mapped from a file.
    """

    source: str
    sizes: dict[str, float]
    limit: int
    blocks: list[BlockParts]
    embedding: Any
    head: Any
    norm: list[float]
    frequency: list[float]
    ends: Callable[[], frozenset[int]]
    tokenizer: Callable[[], Any]
    layers: Layers = field(default_factory=Layers)
    model: Any = None
    recorded: Recorded = field(default_factory=Recorded)


def gather(parts: Parts) -> None:
    """Move the packed matrices of ``parts`` into one piece of memory in huge pages; the old ones are freed one by one."""
    tied = parts.head is parts.embedding
    outer = [parts.embedding] if tied else [parts.embedding, parts.head]
    rooms = [_room(m) for m in outer] + [_room(m) for block in parts.blocks for m in block.weights.values()]
    assert extension is not None
    memory, at = extension.memory(sum(rooms)), 0

    def moved(matrix: Any) -> Any:
        nonlocal at
        place = memory[at : at + matrix.data.size]
        place[:] = matrix.data
        at += _room(matrix)
        return type(matrix).borrow(*matrix.parts, place)

    del outer
    parts.embedding = moved(parts.embedding)
    parts.head = parts.embedding if tied else moved(parts.head)
    for block in parts.blocks:
        for role, matrix in block.weights.items():
            block.weights[role] = moved(matrix)


def _room(matrix: Any) -> int:
    return -(-matrix.data.size // ALIGN) * ALIGN
