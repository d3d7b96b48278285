"""From a checkpoint to :class:`Parts`: the weights are packed for the kernels.

Weights that the checkpoint stores as codes are packed as they are; everything else, the embedding and the head is rounded
in groups of 32 or 64 inputs when it is loaded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Binary, CheckpointError, Codes, LissomError, NumericalError, Stored
from ..core.grid import spread_groups
from ..export import open_model
from ..kernels import Packed, PackedBinary, extension
from ..models import Model
from ..models.forward import inverse_frequencies
from ..models.layout import Sizes
from .parts import ROLES, BlockParts, Layers, Parts, gather
from .recorded import recorded

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Compress = Callable[[str, Tensor], tuple[Codes | Binary, Tensor | None]]
Tick = Callable[[int, int], None]  # matrices that are packed, of how many


def rounded(weight: Tensor, bits: int = 8) -> Codes:
    """Round to nearest on a symmetric grid of 8 or 6 ``bits`` that the kernels read well.

    The grid of ``Grid(bits, symmetric=True)`` up to the rounding of scales. ``Matrix.round`` of the extension makes the same codes.
    """
    rows, columns = weight.shape
    middle = 2 ** (bits - 1)
    group = _group(columns)
    blocks = weight.reshape(rows, -1, group)
    scale = (torch.linalg.vector_norm(blocks, float("inf"), dim=2) / (middle - 1)).half().float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    if not bool(torch.isfinite(scale).all()):
        raise NumericalError(f"weights above 65504 · {middle - 1} or not finite cannot be rounded to int{bits}")
    values = (blocks * inverse[..., None]).round_().clamp_(1 - middle, middle - 1).add_(middle).to(torch.uint8)
    return Codes(values.reshape(rows, columns), scale, torch.full_like(scale, float(middle)), bits, group)


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


def load(
    source: str | Path | Model | Any, compress: Compress | None = None, outer_bits: int = 8, tick: Tick | None = None
) -> Parts:
    """Pack the weights of ``source``, a :class:`Model` or whatever ``open_model`` takes.

    ``compress``: called with (name, fp32 weight) for linear layers that have no codes; without it they are rounded to int8.
    ``outer_bits``: 8 or 6, of the embedding and the head. Raises :class:`CheckpointError` for what the engine cannot run.
    """
    if outer_bits not in (6, 8):
        raise LissomError(f"the embedding and the head have 8 or 6 bits, not {outer_bits}")
    model = source if isinstance(source, Model) else Model(open_model(source))
    why = unsupported(model)
    if why:
        raise CheckpointError(f"{model.checkpoint.source} cannot be run: {why}. Use transformers, or export it")
    parts = _Loader(model, compress, outer_bits, tick or (lambda done, total: None)).parts()
    if extension is not None:
        gather(parts)
    return parts


class _Loader:
    def __init__(self, model: Model, compress: Compress | None, outer_bits: int, tick: Tick):
        self.model, self.compress, self.outer_bits, self.tick = model, compress, outer_bits, tick
        self.present = set(model.checkpoint.names())
        self.layers = Layers()
        self.count = itertools.count(1)  # of several threads
        self.total = sum(len(model.linears(i)) for i in range(model.blocks)) + (1 if model.tied else 2)

    def parts(self) -> Parts:
        model, row = self.model, self.model.architecture
        s = Sizes.of(row, model.config)
        limit = int(getattr(model.config, "max_position_embeddings", 2048))
        frequency, scale = inverse_frequencies(model.config, None, s.head_dim, limit)
        frequencies = frequency.float().flatten().tolist()
        sizes = {
            "layers": model.blocks, "width": s.width, "heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim,
            "inner": s.inner, "vocabulary": s.vocab, "rotary": 2 * len(frequencies), "rotary_scale": float(scale),
            "epsilon": float(getattr(model.config, row.eps)), "attention_scale": s.head_dim**-0.5,
            "window": window(model) or 0,
        }  # fmt: skip
        threads = torch.get_num_threads()
        workers = min(model.blocks, threads, os.cpu_count() or 1)
        torch.set_num_threads(max(1, threads // workers))  # blocks in parallel, not each operation on a block
        try:
            with ThreadPoolExecutor(workers) as pool:
                made = list(pool.map(self.block, range(model.blocks)))
        finally:
            torch.set_num_threads(threads)
        blocks = [block for block, _ in made]
        for _, layers in made:
            self.layers.add(layers)
        embedding = self.round(self.layers, model.embed_name, self.outer_bits)
        head = embedding
        if not model.tied:
            assert model.head_name is not None
            head = self.round(self.layers, model.head_name, self.outer_bits)
        self.layers.bytes += head.bytes
        final = self.vector(f"{model.prefix}{row.final_norm}.weight")
        checkpoint = model.checkpoint
        return Parts(
            str(checkpoint.source), sizes, limit, blocks, embedding, head, final, frequencies,
            lambda: end_tokens(model), checkpoint.tokenizer, self.layers, model,
            recorded(model.operators, model.blocks),
        )  # fmt: skip

    def block(self, i: int) -> tuple[BlockParts, Layers]:
        model, row, layers = self.model, self.model.architecture, Layers()
        packed, biases = {}, {}
        for linear in model.linears(i):
            packed[linear.role] = self.pack(layers, linear.name)
            name = f"{linear.name}.bias"
            biases[linear.role] = self.vector(name) if name in self.present else None
        if any(biases.get(role) is not None for role in ("gate", "up", "down")):
            raise CheckpointError(f"{model.checkpoint.source} cannot be run: block {i} has biases in its MLP")
        bias: list[float] = []
        if any(biases[role] is not None for role in "qkv"):
            for role in "qkv":
                value = biases[role]
                bias += [0.0] * packed[role].rows if value is None else value
        at = f"{model.prefix}{row.layer.format(i)}"
        vectors = {
            "norm1": self.vector(f"{at}{row.norm_attention}.weight"),
            "norm2": self.vector(f"{at}{row.norm_mlp}.weight"),
            "q_norm": self.vector(f"{at}{row.norm_q}.weight") if row.norm_q else [],
            "k_norm": self.vector(f"{at}{row.norm_k}.weight") if row.norm_k else [],
            "bias": bias,
            "o_bias": biases["o"] or [],
        }
        return BlockParts({role: packed[role] for role in ROLES}, vectors), layers

    def vector(self, name: str) -> list[float]:
        return self.model.checkpoint.tensor(name).float().tolist()

    def pack(self, layers: Layers, name: str) -> Any:
        codes, form = stored_codes(self.model.checkpoint, name)
        mask = None
        if codes is not None:
            mask = codes.values != spread_groups(codes.zero, codes.values.shape[1], codes.group_size)
        elif self.compress is not None and not isinstance(form, Binary):
            made, mask = self.compress(name, self.model.checkpoint.tensor(f"{name}.weight").float())
            codes, form = (None, made) if isinstance(made, Binary) else (made, None)
        if isinstance(form, Binary):
            matrix = PackedBinary(form.signs, form.alpha, form.offset, form.group_size).matrix
            layers.forms[name] = f"binary × {len(form.signs)}"
        elif codes is not None:
            packed = Packed(codes, mask)
            layers.forms[name], matrix = str(packed.form), packed.matrix
        else:
            return self.round(layers, f"{name}.weight", 8, name, counted=True)
        layers.bytes += matrix.bytes
        self._ticked()
        return matrix

    def round(self, layers: Layers, tensor: str, bits: int, name: str | None = None, counted: bool = False) -> Any:
        """``counted``: decoding reads all of it (an embedding that is not the head is looked up by row)."""
        weight = self.model.checkpoint.tensor(tensor).float().contiguous()
        name = name or tensor
        group, matrix, form = _group(weight.shape[1]), None, f"int{bits}"
        sparse = bits == 8 and int(torch.count_nonzero(weight)) < weight.numel() // 2
        if group in (32, 64) and not sparse and extension is not None:
            try:
                matrix = extension.Matrix.round(bits, weight.numpy(), group)
            except ValueError as error:
                raise NumericalError(f"{name} cannot be rounded to int{bits}: {error}") from error
        else:
            packed = Packed(rounded(weight, bits), weight != 0 if sparse else None)
            matrix, form = packed.matrix, str(packed.form)
        layers.rounded.append(name)
        layers.forms[name] = form
        layers.bytes += matrix.bytes if counted else 0
        self._ticked()
        return matrix

    def _ticked(self) -> None:
        self.tick(next(self.count), self.total)


def _group(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32 if columns % 32 == 0 else columns


def stored_codes(checkpoint: Any, name: str) -> tuple[Codes | None, Stored | None]:
    """The codes, or another form, of the layer ``name`` where the checkpoint stores what the kernels can read."""
    read = getattr(checkpoint, "layer", None)
    if read is None:
        return None, None
    layer = read(name)
    codes, form = layer.codes, layer.form
    if codes is not None and codes.group_size < codes.values.shape[1] and codes.group_size % 32:
        codes = None
    if isinstance(form, Binary) and (form.group_size % 32 or form.signs.shape[2] % 32):
        form = None
    return codes, form


def window(model: Model) -> int | None:
    """The sliding window of all layers, or None."""
    row, config = model.architecture, model.config
    if row.window == "all":
        return getattr(config, "sliding_window", None)
    if row.window == "types" and set(getattr(config, "layer_types", None) or []) == {"sliding_attention"}:
        return config.sliding_window
    return None


def end_tokens(model: Model) -> frozenset[int]:
    """The tokens that end a text: of the tokenizer, the config and the generation config."""
    found: set[int] = set()
    path = getattr(model.checkpoint, "path", None)
    places = [model.checkpoint.tokenizer(), model.config]
    if path is not None and (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        places.append(GenerationConfig.from_pretrained(path))
    for place in places:
        value = getattr(place, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return frozenset(found)
