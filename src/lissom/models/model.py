"""A model as an architecture row and a checkpoint: blocks are loaded one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import HOST, CheckpointError, is_finite
from .architectures import Architecture, architecture_of
from .checkpoint import Checkpoint
from .forward import Block, Linear, normalise
from .layout import block_parts, has_final_norm, outer_parts, prefix_of
from .operators import KEY, BlockOperators, Operators, read_operators
from .validate import ignorable, tensor_problems

_VOCAB_ROWS = 16384  # rows of a half-precision head that are converted to fp32 at a time


class Model:
    """The model behind ``checkpoint``. Nothing is loaded until asked for.

    ``architecture``: a row to use instead of the one of the table. ``device``: where blocks and the head compute; what enters
    and leaves them stays where it is. Raises :class:`CheckpointError` with every problem that can be found without loading weights.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture | None = None, device: torch.device = HOST):
        problems = checkpoint.problems() if architecture is None else tensor_problems(checkpoint, architecture)
        if problems:
            lines = problems if len(problems) == 1 else [f"- {p}" for p in problems]
            raise CheckpointError(f"{checkpoint.source} cannot be used:\n" + "\n".join(lines))
        self.checkpoint, self.device = checkpoint, device
        self.config: Any = checkpoint.config
        self.architecture = architecture or architecture_of(self.config.model_type)
        self._names = checkpoint.names()
        present = set(self._names)
        self.prefix = prefix_of(self.architecture, present)
        self.blocks: int = self.config.num_hidden_layers
        self.width: int = self.config.hidden_size
        self._parts = [
            [p for p in block_parts(self.architecture, self.config, self.prefix, i) if p.name in present]
            for i in range(self.blocks)
        ]
        self._outer_parts = [
            p for p in outer_parts(self.architecture, self.config, self.prefix, bare=True) if p.name in present
        ]
        self._cache: dict[str, Tensor] = {}
        self.operators: Operators = read_operators(getattr(self.config, KEY, None), f"{checkpoint.source}/config.json")

    # what there is

    @property
    def embed_name(self) -> str:
        """Name of the embedding matrix, (vocabulary, width)."""
        return f"{self.prefix}{self.architecture.embed}.weight"

    @property
    def head_name(self) -> str | None:
        """Name of the head's matrix – that of the embedding when tied – or None without a head."""
        name = f"{self.architecture.head}.weight"
        if any(p.name == name for p in self._outer_parts):
            return name
        return self.embed_name if self.architecture.head and self._tie else None

    @property
    def _tie(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding matrix."""
        return self.head_name == self.embed_name

    @property
    def has_head(self) -> bool:
        return self.head_name is not None

    @property
    def parameters_count(self) -> int:
        """Weights in the file, buffers of old files left out; a tied matrix counts once."""
        names = (n for n in self._names if not ignorable(self.architecture, n))
        return sum(math.prod(self.checkpoint.shape(n)) for n in names)

    def outer_names(self) -> list[str]:
        """Names of all tensors outside of the blocks, those that no forward pass reads included."""
        inside = self.prefix + self.architecture.layer.split("{}")[0]
        return [n for n in self._names if not n.startswith(inside)]

    def linears(self, i: int) -> tuple[Linear, ...]:
        """The linear layers of block ``i`` in the order of the stages."""
        out = []
        for part in self._parts[i]:
            if part.role:
                rows, columns = part.shape[::-1] if self.architecture.transposed else part.shape
                name = part.name.removesuffix(".weight")
                out.append(Linear(name, part.role, part.stage, rows, columns, i))
        return tuple(out)

    # loading

    def load_block(self, i: int) -> Block:
        """Block ``i`` in fp32 on the model's device; raises :class:`CheckpointError` for NaN or Inf. Cached outer tensors are let go."""
        self.release()
        parameters = {}
        for part in self._parts[i]:
            value = self._read(part.name).to(self.device).to(torch.float32)
            parameters[part.name] = value.T.contiguous() if part.role and self.architecture.transposed else value
        block = Block(self.architecture, self.config, i, self.prefix, self.linears(i), parameters)
        block.operators = BlockOperators(self.operators, i) if self.operators else None
        return block

    def load_outer(self) -> dict[str, Tensor]:
        """Every outer tensor that the forward pass reads, fp32, for training: pass it to ``embed`` and ``head``."""
        return {p.name: self._read(p.name).to(torch.float32) for p in self._outer_parts}

    def check_weights(self) -> None:
        """Read every tensor once, one at a time; raises :class:`CheckpointError` for NaN or Inf."""
        for name in self._names:
            self._read(name)

    def release(self) -> None:
        """Let go of the embedding and head that ``embed`` and ``head`` keep between calls."""
        self._cache.clear()

    def _read(self, name: str) -> Tensor:
        value = self.checkpoint.tensor(name)
        if value.is_floating_point() and not is_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(
                f"{name} {tuple(value.shape)} of {self.checkpoint.source} holds {bad} values that are NaN or Inf: "
                "the checkpoint is damaged; get it again"
            )
        return value

    def _outer(self, name: str, given: Mapping[str, Tensor] | None) -> Tensor | None:
        """An outer tensor by its full name, as stored, or None where the file has none."""
        if given is not None:
            return given.get(name)
        if name not in self._cache:
            if not any(p.name == name for p in self._outer_parts):
                return None
            self._cache[name] = self._read(name).to(self.device)
        return self._cache[name]

    # both ends of the forward pass

    def embed(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        token_types: Tensor | None = None,
        outer: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states that enter block 0, (batch, tokens, width) fp32, where ``ids`` are; ``ids``, ``position_ids``: (batch, tokens).

        ``outer``: tensors to use instead of the file's, see :meth:`load_outer`.
        """
        row = self.architecture

        def look_up(name: str, at: Tensor) -> Tensor:
            table = self._outer(f"{self.prefix}{name}.weight", outer)
            assert table is not None
            if at.numel() and int(at.max()) >= table.shape[0]:
                raise CheckpointError(f"{name} has {table.shape[0]} rows: id or position {int(at.max())} is outside")
            return F.embedding(at.to(table.device), table).float()

        h = look_up(row.embed, ids)
        if row.embed_scale:
            h = h * self.width**0.5
        h = self._project(h, row.project_in, outer)
        if row.embed_types:
            h = h + look_up(row.embed_types, torch.zeros_like(ids) if token_types is None else token_types)
        if row.embed_positions:
            at = torch.arange(ids.shape[-1], device=ids.device) if position_ids is None else position_ids
            h = h + look_up(row.embed_positions, at + row.position_offset)
        return self._norm(h, row.embed_norm, outer).to(ids.device)

    def head(self, h: Tensor, outer: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (batch, tokens, vocabulary), where ``h`` is, from the last block's output; without a head, its normalised output."""
        row, home = self.architecture, h.device
        h = h.to(self.device if outer is None else next(iter(outer.values())).device)
        if has_final_norm(row, self.config):
            h = self._norm(h, row.final_norm, outer)
        h = self._project(h, row.project_out, outer)
        if self.head_name is None:
            return h.to(home)
        weight = self._outer(self.head_name, outer)
        assert weight is not None
        if weight.dtype == torch.float32:
            logits = F.linear(h, weight)
        else:
            logits = torch.cat([F.linear(h, part.float()) for part in weight.split(_VOCAB_ROWS)], dim=-1)
        bias = self._outer(f"{row.head}.bias", outer)
        if bias is not None:
            logits = logits + bias.float()
        cap = getattr(self.config, row.head_cap, None) if row.head_cap else None
        return (torch.tanh(logits / cap) * cap if cap else logits).to(home)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the whole model, one block in memory at a time; ``ids``, ``mask``: (batch, tokens)."""
        h = self.embed(ids)
        for i in range(self.blocks):
            h = self.load_block(i).forward(h, mask=mask)
        return self.head(h)

    def pool(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the tokens that are not padding, (batch, width): the sentence vector of an encoder."""
        if mask is None:
            return h.mean(1)
        seen = mask[..., None].to(h.dtype)
        return (h * seen).sum(1) / seen.sum(1).clamp_min(1)

    def _project(self, h: Tensor, name: str | None, outer: Mapping[str, Tensor] | None) -> Tensor:
        weight = self._outer(f"{self.prefix}{name}.weight", outer) if name else None
        return h if weight is None else F.linear(h, weight.float())

    def _norm(self, h: Tensor, name: str | None, outer: Mapping[str, Tensor] | None) -> Tensor:
        if name is None:
            return h
        weight, bias = (self._outer(f"{self.prefix}{name}.{kind}", outer) for kind in ("weight", "bias"))
        return normalise(
            self.architecture, self.config, h,
            None if weight is None else weight.float(), None if bias is None else bias.float(),
        )  # fmt: skip
