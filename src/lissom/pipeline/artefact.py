"""From solved layers to the files of the artefact, and the weights that go on through the stream.

What goes on is what a reader of the file will get: every tensor is encoded, decoded again, and only then used, so that
the statistics of later layers – and the reported errors – are those of the artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import HOST, Both, Grid, Problem, Solved, Stack, Stats, grid_of
from ..export import ArtefactWriter, CompressedTensors, Layout, StoredLayer, codec_named
from ..models import Block, Linear, Model
from ..models.operators import KEY
from .sections import Save
from .stream import LayerResult
from .verify import checksum


@dataclass(frozen=True)
class LayerRecord:
    """What the manifest keeps of a linear layer. ``bytes`` on disk; ``checksum`` CRC-32 of the decoded fp32 weights.

    ``error``, ``relative_error``: of the layer, as its solver left it. ``healed``: when a block step went over it, the
    relative error of the whole block's output before and after, on samples held back. ``input_scale``: the static scale of
    its rounded inputs.
    """

    name: str
    block: int
    role: str
    shape: list[int]
    weights: int
    pattern: str
    sparsity: float
    bits: int
    group_size: int | None
    cluster: int | None
    error: float | None
    relative_error: float | None
    damping: float | None
    dead_inputs: int
    bytes: int
    checksum: int
    healed: Mapping[str, float] | None = None
    input_scale: float | None = None


_NOT_WEIGHTS = {"bias", "input_scale"}  # of a layer, beside what its codec wrote


def artefact_dtype(model: Model, wanted: str) -> torch.dtype:
    """``auto``: the checkpoint's own dtype; half precision for GGUF, whose tensors are dequantized from blocks."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if getattr(model.checkpoint, "format", "") == "gguf":
        return torch.float16
    stored = model.checkpoint.dtype(model.embed_name)
    return stored if stored in (torch.float16, torch.bfloat16, torch.float32) else torch.float16


class Artefact:
    """Writes into ``work``; block i is file i, everything outside of blocks is one more."""

    def __init__(self, work: Path, model: Model, save: Save):
        self.model, self.save = model, save
        self.codec = codec_named(save.format)
        if isinstance(self.codec, CompressedTensors) and model.operators.cache:
            self.codec = CompressedTensors(self.codec.format, self.codec.zero_points, model.operators.cache[0])
        self.dtype = artefact_dtype(model, save.dtype)
        self.writer = ArtefactWriter(work)
        self._entries: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, Tensor] = {}

    def has(self, i: int) -> bool:
        """Whether block ``i`` is complete on disk."""
        return self.writer.has(f"block-{i:05d}")

    def store(self, name: str, solved: Solved, layout: Layout) -> tuple[Tensor, int]:
        """Encode one matrix; returns the weights as they decode and the bytes they take."""
        local = self.codec.encode(solved, layout)
        entry = self.codec.entry(solved, layout)
        stored = self.codec.decode(local, entry).weight
        self._entries[name] = entry
        self._pending |= {f"{name}.{k}": v for k, v in local.items()}
        return stored, sum(t.numel() * t.element_size() for t in local.values())

    def carried(self, name: str) -> tuple[Solved | None, str]:
        """A matrix as the source stores it, with its pattern, where both are packed (other formats forget masks); else None."""
        source = self.model.checkpoint
        if {getattr(source, "format", ""), self.save.format} != {"packed"} or name not in getattr(
            source, "entries", {}
        ):
            return None, "dense"
        held: StoredLayer = source.layer(name)  # type: ignore[attr-defined]
        solved = Solved(held.weight, held.codes, held.mask, torch.zeros(len(held.weight)), stored=held.form)
        return solved, held.pattern

    def layer(
        self, block: Block, layer: Linear, result: LayerResult | None, cluster: int | None
    ) -> tuple[Callable[[], LayerRecord], Tensor]:
        """Encode a linear layer; one that no step touched is stored as in the source, see :meth:`carried`, or dense.

        Returns what makes its record, which goes through all weights and that nothing else waits for, and the weights as they decode.
        """
        transposed = self.model.architecture.transposed
        solved, pattern = (result.solved, result.pattern) if result else self.carried(layer.name)
        if solved is None:
            kept = block.weight(layer.name).to(HOST).to(self.dtype)
            self._pending[f"{layer.name}.weight"] = (kept.T if transposed else kept).contiguous()
            stored, size, bits, group = kept.float(), kept.numel() * kept.element_size(), 16, None
        else:
            grid = self.model.operators.activations
            bits = grid.bits if grid and layer.stage in grid.stages else None
            layout = Layout(self.dtype, pattern, transposed, bits, bool(grid and grid.static))
            stored, size = self.store(layer.name, solved, layout)
            bits, group = grid_of(solved.codes or solved.stored) or (16, None)
        scale = block.operators.scales.get(layer.stage) if block.operators else None
        if scale is not None and isinstance(self.codec, CompressedTensors):
            self._pending[f"{layer.name}.input_scale"] = torch.tensor([scale], dtype=torch.float16)
        notes: Mapping[str, float] = result.notes if result else {}
        record = partial(
            LayerRecord, layer.name, layer.block, layer.role, [layer.rows, layer.columns], layer.rows * layer.columns, pattern,
            bits=bits, group_size=group, cluster=cluster,
            error=result.error if result else None, relative_error=result.relative_error if result else None,
            damping=notes.get("damping"), dead_inputs=int(notes.get("dead", 0)), bytes=size,
            healed={k: notes[f"block_error_{k}"] for k in ("before", "after")} if "block_error_after" in notes else None,
            input_scale=scale,
        )  # fmt: skip

        def summed() -> LayerRecord:
            zeros = stored.numel() - int(stored.count_nonzero())
            return record(sparsity=zeros / stored.numel(), checksum=checksum(stored))

        return summed, stored

    def read(self, i: int) -> dict[str, StoredLayer]:
        """The encoded layers of block ``i`` as its finished part holds them."""
        tensors, entries = self.writer.read(f"block-{i:05d}")
        tensors = {k: t for k, t in tensors.items() if k.rpartition(".")[2] not in _NOT_WEIGHTS}
        return {
            name: self.codec.decode(
                {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}, entry
            )
            for name, entry in entries.items()
        }

    def settle(self, block: Block) -> None:
        """Round what is not a linear layer (norms, biases) as the file will hold it, before the block runs."""
        linear = {f"{layer.name}.weight" for layer in block.linears}
        for name, value in block.parameters.items():
            if name not in linear and value.is_floating_point():
                block.set_parameter(name, value.to(self.dtype).float())

    def part(self, i: int, block: Block) -> Callable[[], int]:
        """What writes block ``i``: its linear layers as encoded, the rest in the artefact's dtype. Nothing is pending then."""
        rest = block.tensors(without={f"{layer.name}.weight" for layer in block.linears})
        tensors, entries = self._pending | {k: v.to(self.dtype) for k, v in rest.items()}, self._entries
        self._pending, self._entries = {}, {}
        return partial(self.writer.add, f"block-{i:05d}", tensors, entries)

    def outer(self) -> dict[str, Tensor]:
        """Write everything outside of blocks; returns the tensors as a reader gets them, fp32, by name.

        Embedding and head are rounded to nearest on a grid of ``embedding_bits`` when the recipe says so.
        """
        quantize = {self.model.embed_name, self.model.head_name} if self.save.embedding_bits != 16 else set()
        out: dict[str, Tensor] = {}
        for name in self.model.outer_names():
            value = self.model.checkpoint.tensor(name)
            if name in quantize:
                grid = Grid(self.save.embedding_bits, min(self.save.embedding_group_size, value.shape[1]))
                problem = Problem(
                    value.float(), Stats.empty(value.shape[1], gram=False), Stack(((len(value), Both(None, grid)),))
                )
                out[name], _ = self.store(
                    name.removesuffix(".weight"), problem.project(problem.weight), Layout(self.dtype)
                )
            elif (held := self.carried(name.removesuffix(".weight"))[0]) is not None:
                out[name], _ = self.store(name.removesuffix(".weight"), held, Layout(self.dtype))
            else:
                kept = value.to(self.dtype) if value.is_floating_point() else value
                self._pending[name], out[name] = kept, kept.float() if value.is_floating_point() else kept
        self.writer.add("outer", self._pending, self._entries)
        self._pending, self._entries = {}, {}
        return out

    def close(self) -> dict[str, int]:
        """Write index, configuration and tokenizer; returns bytes by part of the finished weight files."""
        entries = self.writer.entries()
        cached = isinstance(self.codec, CompressedTensors) and self.codec.cache is not None
        quantization = self.codec.config(entries, Layout(self.dtype)) if entries or cached else None
        more = {KEY: self.model.operators.describe()} if self.model.operators else {}
        self.writer.finish(self.model.checkpoint, self.dtype, quantization, more)
        return self.writer.bytes_by_part()


_PARTS = {"q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attention"}


def bytes_after(records: Sequence[LayerRecord], total: int) -> dict[str, int]:
    """Bytes of the finished files: attention, MLP, and the rest (embedding, head, norms, headers)."""
    out = {"attention": 0, "mlp": 0}
    for r in records:
        out[_PARTS.get(r.role, "mlp")] += r.bytes
    return out | {"embedding and rest": total - sum(out.values())}


def bytes_before(model: Model, total: int) -> dict[str, int]:
    """The same of the checkpoint, linear layers at its average bytes per weight."""
    out = {"attention": 0.0, "mlp": 0.0}
    each = total / model.parameters_count
    for i in range(model.blocks):
        for layer in model.linears(i):
            out[_PARTS.get(layer.role, "mlp")] += layer.rows * layer.columns * each
    return {k: round(v) for k, v in out.items()} | {"embedding and rest": round(total - sum(out.values()))}
