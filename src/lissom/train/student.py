"""A whole model in memory, made of its staged blocks, with some of its weights replaced by trained forms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ..core import CheckpointError
from ..models import Block, Model
from .forms import Form


@dataclass
class Output:
    """What a forward gives. ``logits`` (batch, tokens, vocabulary); ``hidden``: after each block, (batch, tokens, width);
    ``qkv``: of each block, (batch, heads, tokens, head_dim) each, before positions are applied; both only when asked for."""

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    qkv: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


def hardware(config: Any, run: torch.device) -> tuple[str, Literal["float32", "bfloat16"]]:
    """The device and the precision that a step trains with; ``auto`` is the device of the ``run``."""
    device = str(run) if config.device == "auto" else config.device
    if config.precision != "auto":
        return device, config.precision
    return device, "bfloat16" if device.startswith("cuda") else "float32"


class Network:
    """All blocks and outer tensors of ``model`` in fp32. ``forms``: tensor name as in the file → what it is made from.

    ``recompute``: do not keep what happens inside of blocks for the backward pass (one more forward, less memory).
    Weights of linear layers are (out, in) whatever the layout of the file.
    """

    def __init__(self, model: Model, forms: Mapping[str, Form] | None = None, recompute: bool = False):
        if not model.has_head:
            raise CheckpointError(f"{model.checkpoint.source} has no language-model head: only decoders can be trained")
        self.model, self.recompute = model, recompute
        self.forms: dict[str, Form] = dict(forms or {})
        self.blocks: list[Block] = [model.load_block(i) for i in range(model.blocks)]
        self.outer = model.load_outer()
        model.release()

    def to(self, device: str | torch.device) -> Network:
        """Move everything to ``device``, forms too: take ``leaves`` afterwards."""
        for block in self.blocks:
            block.parameters = {k: v.to(device) for k, v in block.parameters.items()}
        self.outer = {k: v.to(device) for k, v in self.outer.items()}
        for form in self.forms.values():
            form.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self.outer.values())).device

    def tensor(self, name: str) -> Tensor:
        """A tensor as it was loaded, whatever form stands for it."""
        for block in self.blocks:
            if name in block.parameters:
                return block.parameters[name]
        return self.outer[name]

    def leaves(self) -> dict[str, Tensor]:
        """Everything that is trained, by the name of the tensor and of its leaf; a shared leaf comes once."""
        out: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, form in self.forms.items():
            for leaf, value in form.leaves().items():
                if id(value) not in seen:
                    seen.add(id(value))
                    out[f"{name}:{leaf}"] = value
        return out

    def forward(self, ids: Tensor, hidden: bool = False, qkv: bool = False) -> Output:
        """Logits for ``ids`` (batch, tokens) from anywhere, and what else is asked for, on the network's device."""
        with self.device:
            return self._forward(ids.to(self.device), hidden, qkv)

    def _forward(self, ids: Tensor, hidden: bool, qkv: bool) -> Output:
        outer = {k: self.forms[k].weight() if k in self.forms else v for k, v in self.outer.items()}
        h = self.model.embed(ids, outer=outer)
        out = Output(h)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled() and not qkv:
                h = recompute(lambda x, b=block: self._view(b).forward(x), h, use_reentrant=False)  # type: ignore[assignment]
                assert isinstance(h, Tensor)
            else:
                view = self._view(block)
                run = view.start(h)
                if qkv:
                    out.qkv.append(view.queries_keys_values(run.input()))
                for _ in view.stages:
                    run.advance()
                h = run.output()
            if hidden:
                out.hidden.append(h)
        out.logits = self.model.head(h, outer=outer)
        return out

    @torch.no_grad()
    def settle(self) -> None:
        """Put the final weights of all forms into the blocks, and forget the forms."""
        for name, form in self.forms.items():
            for block in self.blocks:
                if name in block.parameters:
                    block.set_parameter(name, form.final())
            if name in self.outer:
                self.outer[name] = form.final()
        self.forms = {}

    def _view(self, block: Block) -> Block:
        made = {k: self.forms[k].weight() for k in block.parameters if k in self.forms}
        if not made:
            return block
        view = copy.copy(block)
        view.parameters = block.parameters | made
        return view
