"""The artefact's directory, written part by part: a part that is there is complete, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core import FormatError, OutputError
from ..models import Checkpoint
from ..models.safetensors_header import read_header
from .files import read_metadata, verify_file, write_file
from .layout import dtype_name

_PART, _LAYERS = "part", "layers"
INDEX = "model.safetensors.index.json"


class ArtefactWriter:
    """Appends parts (one block each) to ``folder`` and closes it into a Hugging Face directory.

    Each part is one safetensors file with its name and the entries of its layers in the metadata, so that a run
    killed at any moment finds what is complete (:meth:`has`). Parts are numbered in the order of their names.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts: dict[str, Path] = {}
        self._holder: dict[str, str] = {}  # tensor name → part
        for stale in self.folder.glob("*.safetensors.tmp"):
            stale.unlink()
        for file in sorted(self.folder.glob("*.safetensors")):
            part = read_metadata(file).get(_PART)
            if part is None:
                continue
            try:
                self._holder |= dict.fromkeys(verify_file(file), part)
            except FormatError:  # cannot happen by a kill, but by a bad disk: the part is made again
                file.unlink()
                continue
            self._parts[part] = file

    def has(self, part: str) -> bool:
        """Whether ``part`` is complete on disk, its checksum included."""
        return part in self._parts

    def add(
        self, part: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]] | None = None
    ) -> int:
        """Write one part, replacing an older one; returns its bytes. ``entries``: layer name → codec entry.

        Raises :class:`OutputError` when the disk is full; parts that are finished stay.
        """
        for name in tensors:
            if self._holder.get(name, part) != part:
                raise OutputError(f"part {part} brings {name} again, which part {self._holder[name]} holds")
        path = self._parts.get(part, self.folder / f"part-{part}.safetensors")
        size = write_file(path, tensors, {_PART: part, _LAYERS: json.dumps(entries or {}, sort_keys=True)})
        self._parts[part] = path
        self._holder |= dict.fromkeys(tensors, part)
        return size

    def read(self, part: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """The tensors and the codec entries of a finished part."""
        file = self._parts[part]
        return load_file(file), json.loads(read_metadata(file).get(_LAYERS, "{}"))

    def entries(self) -> dict[str, dict[str, Any]]:
        """The codec entries of all layers written so far, in the order of the parts."""
        out: dict[str, dict[str, Any]] = {}
        for part in sorted(self._parts):
            out |= json.loads(read_metadata(self._parts[part]).get(_LAYERS, "{}"))
        return out

    def bytes_by_part(self) -> dict[str, int]:
        return {part: self._parts[part].stat().st_size for part in sorted(self._parts)}

    def finish(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Number the files, and write index, config.json (with ``more``) and the assets of ``checkpoint``. May be repeated."""
        names = sorted(self._parts)
        weights: dict[str, str] = {}
        total = 0
        try:
            for number, part in enumerate(names, 1):
                single = len(names) == 1
                file = "model.safetensors" if single else f"model-{number:05d}-of-{len(names):05d}.safetensors"
                os.replace(self._parts[part], self.folder / file)
                self._parts[part] = self.folder / file
                header = read_header(self.folder / file)
                weights |= dict.fromkeys(header, file)
                total += sum(entry.size for entry in header.values())
            if len(names) > 1:
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
                write_json(self.folder / INDEX, index)
            write_json(self.folder / "config.json", config_of(checkpoint, dtype, quantization) | dict(more or {}))
            checkpoint.copy_assets(self.folder)
        except OSError as error:
            raise OutputError(
                f"cannot finish {self.folder}: {error.strerror or error}. The weights are kept: make room and run again"
            ) from error


def config_of(checkpoint: Checkpoint, dtype: torch.dtype, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json: the source's configuration with the artefact's dtype and quantization."""
    config = dict(checkpoint.config.to_dict())
    for key in ("quantization_config", "_name_or_path", "torch_dtype", "gguf_file"):
        config.pop(key, None)
    if not config.get("architectures"):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        if type(checkpoint.config) in known:
            config["architectures"] = [known[type(checkpoint.config)].__name__]
    config["dtype"] = dtype_name(dtype)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
