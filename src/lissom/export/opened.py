"""Checkpoints of every format opened alike: ``tensor(name)`` is decoded, ``layer(name)`` is what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core import CheckpointError, FormatError
from ..models import Architecture, Checkpoint, architecture_of, open_checkpoint, tensor_problems
from ..models.operators import KEY
from ..models.safetensors_header import Entry, read_header
from ..models.validate import pickle_problem, shard_problems
from .compressed import LOCAL_NAMES as COMPRESSED_NAMES
from .compressed import METHOD as COMPRESSED
from .compressed import RUN_NAMES, CompressedTensors, entry_from_config, operators_from_config
from .files import verify_file
from .forms import form_names
from .gptq import GPTQ
from .gptq import LOCAL_NAMES as GPTQ_NAMES
from .gptq import METHOD as GPTQ_METHOD
from .gptq import entry_from_config as gptq_entry
from .layout import DTYPES, Codec, StoredLayer, shape_of
from .masks import MASK_NAMES
from .packed import VERSION, Packed

_PACKED_NAMES = ("codes", "values", "scale", "zero", *MASK_NAMES)


class OpenedCheckpoint:
    """A :class:`~lissom.models.Checkpoint` that decodes. ``format``: dense, packed, compressed-tensors, gptq or gguf.

    Files with a checksum are verified when the first of their tensors is read; :class:`FormatError` when damaged.
    """

    def __init__(self, base: Checkpoint):
        self.base = base
        self.source = base.source
        self.config: Any = base.config
        path = getattr(base, "path", None)
        self.path: Path | None = path if path is not None and Path(path).is_dir() else None
        self.format = "gguf" if self.path is None else "dense"
        self.entries: dict[str, dict[str, Any]] = {}
        self._codec: Codec | None = None
        self._local: dict[str, dict[str, str]] = {}  # layer → local name → name in the file
        self._verified: set[Path] = set()
        self._files: dict[str, tuple[Path, Entry]] = {}
        self._problems: list[str] = []
        if self.path is not None:
            self._index(self.path)
            quantization = _plain(getattr(self.config, "quantization_config", None))
            if quantization:
                self._quantized(quantization)
                del self.config.quantization_config  # what this checkpoint hands out is decoded
        encoded = {name for names in self._local.values() for name in names.values()}
        encoded |= {f"{layer}.{local}" for layer in self._local for local in RUN_NAMES}
        plain = [name for name in (self._files or base.names()) if name not in encoded]
        self._names = plain + [f"{layer}.weight" for layer in self._local]

    def _index(self, folder: Path) -> None:
        shards, self._problems = shard_problems(folder)
        for shard, listed in shards.items():
            try:
                header = read_header(shard)
            except CheckpointError as error:
                self._problems.append(str(error))
                continue
            self._problems += [f"{shard.name} lacks {n}, which the index places there" for n in listed - set(header)]
            self._files |= {name: (shard, entry) for name, entry in header.items()}
        if not shards and not self._problems:
            self._problems.append(pickle_problem(folder))

    def _quantized(self, quantization: Mapping[str, Any]) -> None:
        method = quantization.get("quant_method")
        if method == "lissom":
            if quantization.get("format") == "integer":
                raise CheckpointError(
                    f"{self.source} holds an encoder in integers, without float weights: `lissom evaluate` judges it, "
                    "lissom.load_encoder runs it"
                )
            self.format, self._codec = "packed", Packed()
            if quantization.get("version") != VERSION:
                raise FormatError(
                    f"{self.source} is packed in version {quantization.get('version')!r} of the format; this lissom "
                    f"reads version {VERSION}: install the lissom that wrote it, or a newer one"
                )
            for layer, entry in quantization.get("layers", {}).items():
                self.entries[layer] = dict(entry)
                self._local[layer] = self._find(layer, form_names(entry["form"]) if "form" in entry else _PACKED_NAMES)
        elif method == COMPRESSED:
            self.format, self._codec = COMPRESSED, CompressedTensors()
            if getattr(self.config, KEY, None) is None:
                found = operators_from_config(quantization, architecture_of(self.config.model_type))
                if found:
                    setattr(self.config, KEY, found)
            for name in list(self._files):
                layer, _, local = name.rpartition(".")
                if local == "weight_scale":
                    self._local[layer] = self._find(layer, COMPRESSED_NAMES)
                    entry = entry_from_config(quantization, layer, self._local[layer])
                    self.entries[layer] = entry | {"shape": self._compressed_shape(layer)}
        elif method == GPTQ_METHOD:
            self.format, self._codec = GPTQ_METHOD, GPTQ()
            for name in [n for n in self._files if n.endswith(".qweight")]:
                layer, header = name.removesuffix(".qweight"), self._files[name][1]
                self._local[layer] = self._find(layer, GPTQ_NAMES)
                self.entries[layer] = gptq_entry(quantization, layer, tuple(header.shape), header.dtype)
        else:
            raise CheckpointError(
                f"{self.source} is quantized by {method!r}, which lissom does not read; it reads its own packed form, "
                "compressed-tensors, GPTQ and GGUF"
            )

    def _find(self, layer: str, names: Iterable[str]) -> dict[str, str]:
        found = {local: f"{layer}.{local}" for local in names if f"{layer}.{local}" in self._files}
        if not found:
            self._problems.append(f"{self.source} has no tensors of the layer {layer}, which its config.json names")
        return found

    def _compressed_shape(self, layer: str) -> list[int]:
        local = self._local[layer]
        if "weight_shape" in local:
            return [int(n) for n in self._raw(local["weight_shape"])]
        rows, columns = self._files[local["weight" if "weight" in local else "weight_packed"]][1].shape
        return [rows, columns if "weight" in local else 2 * columns]  # FP4: two in a byte

    @property
    def bytes(self) -> int:
        return self.base.bytes

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        layer = self._encoded(name)
        if layer is None:
            return tuple(self._files[name][1].shape) if name in self._files else tuple(self.base.shape(name))
        shape = shape_of(self.entries[layer])
        return shape[::-1] if self.entries[layer].get("transposed") else shape

    def dtype(self, name: str) -> torch.dtype:
        """float32 for quantized matrices: their decoded values need it."""
        layer = self._encoded(name)
        if layer is None:
            return self._files[name][1].dtype if name in self._files else self.base.dtype(name)
        return DTYPES.get(str(self.entries[layer].get("dtype")), torch.float32)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the Hugging Face layout, decoded."""
        layer = self._encoded(name)
        if layer is None:
            return self._raw(name) if name in self._files else self.base.tensor(name)
        weight = self.layer(layer).weight.to(self.dtype(name))
        return weight.T.contiguous() if self.entries[layer].get("transposed") else weight

    def layer(self, name: str) -> StoredLayer:
        """The matrix ``name`` (without ".weight") as it is stored, (out, in) whatever the file's layout."""
        if name not in self._local:
            weight = self.tensor(f"{name}.weight").float()
            turned = _is_conv1d(architecture_of(self.config.model_type), name)
            return StoredLayer(None, None, "dense", weight.T.contiguous() if turned else weight)
        assert self._codec is not None
        tensors = {local: self._raw(full) for local, full in self._local[name].items()}
        try:
            return self._codec.decode(tensors, self.entries[name])
        except FormatError as error:
            raise FormatError(f"{name} in {self.source}: {error}") from error

    def tokenizer(self) -> Any:
        return self.base.tokenizer()

    def copy_assets(self, out: Path) -> None:
        self.base.copy_assets(out)

    def fingerprint(self) -> str:
        return self.base.fingerprint()

    def problems(self) -> list[str]:
        if self.path is None:
            return self.base.problems()
        return self._problems or tensor_problems(self)

    def stored(self) -> dict[str, int]:
        """Bytes in the files by tensor name, as stored; empty for GGUF."""
        return {name: entry.size for name, (_, entry) in self._files.items()}

    def _encoded(self, name: str) -> str | None:
        """The layer behind ``name`` when it has to be decoded."""
        layer = name.removesuffix(".weight")
        return layer if layer != name and layer in self._local else None

    def _raw(self, name: str) -> Tensor:
        file = self._files[name][0]
        if file not in self._verified:
            verify_file(file)
            self._verified.add(file)
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name).clone()


def open_model(source: str | Path | Checkpoint) -> OpenedCheckpoint:
    """Open a dense, packed, compressed-tensors or GPTQ directory, a GGUF file, a hub id or "demo"; nothing is loaded.

    Raises :class:`CheckpointError` when there is no such checkpoint, :class:`FormatError` for a packed one of an
    unknown version.
    """
    if isinstance(source, OpenedCheckpoint):
        return source
    return OpenedCheckpoint(open_checkpoint(source) if isinstance(source, str | Path) else source)


def _plain(config: Any) -> dict[str, Any] | None:
    if config is None or isinstance(config, dict):
        return config
    return config.to_dict()


def _is_conv1d(row: Architecture, name: str) -> bool:
    modules = [*(m for _, m in (*row.attention, *row.mlp)), row.o, row.down]
    return row.transposed and any(name.endswith(module) for module in modules)
