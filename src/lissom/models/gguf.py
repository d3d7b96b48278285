"""GGUF files as checkpoints: tensors are dequantized to fp32 one at a time, under their transformers names and layouts.

llama.cpp's converter stores some tensors differently; :func:`_restore` undoes it. The maths of each case:

    llama      rows of q and k: (head, half, pair) stored as (head, pair, half), because ggml rotates neighbours
    gemma2/3   norms hold 1 + w
    gpt2       Conv1D matrices are turned to (out, in)
    bloom      qkv rows (head, 3, head_dim) stored as (3, head, head_dim)
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError
from .architectures import Architecture, architecture_of
from .gguf_header import Header, Stored, read_gguf_header, slim_copy
from .layout import Part, Sizes, block_parts, outer_parts
from .validate import tensor_problems

# what transformers' own table leaves out for some architectures
_MORE_SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MORE_SIZES = {"token_embd.weight": "vocab_size", "position_embd.weight": "max_position_embeddings"}


class GGUFCheckpoint:
    """A ``.gguf`` file; config and tokenizer are made by transformers from the file's metadata."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.source = str(path)
        self._tokenizer: Any = None
        self._header = read_gguf_header(self.path)
        architecture = self._header.architecture
        self.config: Any = _config(self._header)
        self.row = architecture_of(self.config.model_type)
        self._problems = self._header.problems()
        self._parts: dict[str, Part] = {}
        self._stored: dict[str, Stored] = {}
        for part, name in _names(self.row, self.config, architecture).items():
            if name in self._header.tensors:
                self._parts[part.name], self._stored[part.name] = part, self._header.tensors[name]
        used = {item.name for item in self._stored.values()}
        self._problems += [
            f"{self.path} has the tensor {name}, which lissom does not read from GGUF (rope factors, experts, …): "
            "use the original safetensors checkpoint"
            for name in sorted(self._header.tensors.keys() - used)
        ][:8]

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensor(name).shape
        return shape[::-1] if self.row.transposed and self._parts[name].role else shape

    def dtype(self, name: str) -> torch.dtype:
        self._tensor(name)
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        """Dequantized to fp32 by gguf's own reference code."""
        value = torch.from_numpy(self._header.read(self._tensor(name).name))
        return _restore(self.row, self.config, self._parts[name], value)

    def tokenizer(self) -> Any:
        from .checkpoint import load_tokenizer

        if self._tokenizer is None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self._tokenizer = load_tokenizer(self.path.parent, gguf_file=self.path.name)
        return self._tokenizer

    def copy_assets(self, out: Path) -> None:
        """Write the tokenizer that the file's metadata describes."""
        self.tokenizer().save_pretrained(out)

    def fingerprint(self) -> str:
        from .checkpoint import fingerprint

        return fingerprint([self.path], self.names(), self.config)

    def problems(self) -> list[str]:
        return self._problems + tensor_problems(self)

    def _tensor(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} has no tensor {name}")
        return self._stored[name]


def _config(header: Header) -> Any:
    from transformers import AutoConfig

    try:
        with slim_copy(header) as slim, contextlib.redirect_stderr(io.StringIO()):
            config = AutoConfig.from_pretrained(slim.parent, gguf_file=slim.name)
    except Exception as error:  # transformers raises whatever its mapping runs into
        raise CheckpointError(
            f"{header.path}: transformers cannot read the architecture {header.architecture!r} from GGUF ({error}); "
            "use the original safetensors checkpoint"
        ) from error
    config._name_or_path = str(header.path)
    for key, name in _MORE_SETTINGS.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    for tensor, name in _MORE_SIZES.items():
        if tensor in header.tensors:
            setattr(config, name, header.tensors[tensor].shape[0])
    return config


def _names(row: Architecture, config: Any, architecture: str) -> dict[Part, str]:
    """Every expected tensor with its GGUF name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    keys = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not keys:
        raise CheckpointError(f"GGUF architecture {architecture!r} is not known to the gguf library")
    names = get_tensor_name_map(keys[0], config.num_hidden_layers)
    parts = list(outer_parts(row, config, row.prefixes[0], bare=False))
    for i in range(config.num_hidden_layers):
        parts += block_parts(row, config, row.prefixes[0], i)
    out = {}
    for part in parts:
        module, _, kind = part.name.rpartition(".")
        # the library's table has some families with their prefix and some without
        spellings = (prefix + module.removeprefix(row.prefixes[0]) for prefix in row.prefixes)
        name = next(filter(None, map(names.get_name, spellings)), None)
        if name is not None:
            out[part] = f"{name}.{kind}"
    return out


def _restore(row: Architecture, config: Any, part: Part, value: Tensor) -> Tensor:
    """From llama.cpp's layout back to that of transformers."""
    sizes = Sizes.of(row, config)
    role, module = part.role, part.name.rpartition(".")[0]
    if row.name in ("llama", "mistral"):
        q, k = (module.endswith(name) for _, name in row.attention[:2])
        if q or k:
            heads = sizes.heads if q else sizes.kv_heads
            return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    elif row.norm == "rms+1" and part.name.endswith("norm.weight"):
        return value - 1
    elif row.transposed and role:
        return value.T.contiguous()
    elif row.qkv == "heads" and row.name == "bloom" and module.endswith(row.attention[0][1]):
        return value.unflatten(0, (3, sizes.heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    return value
