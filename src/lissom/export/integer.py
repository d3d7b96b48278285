"""An encoder in integers on disk: every tensor in the smallest integer type, nothing in floats (format ``integer``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core import FormatError
from ..methods.quantize.ibert_encoder import IntEncoder, IntLayer, IntLinear, IntNorm, encode
from ..models import Checkpoint, load_tokenizer
from .files import verify_file, write_file
from .writer import config_of, write_json

FORMAT = "integer"
_FILE = "model.safetensors"
_TYPES = {cls.__name__: cls for cls in (IntEncoder, IntLayer, IntLinear, IntNorm)}
_SIZES = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class IntegerModel:
    """A loaded encoder. ``encoder`` works on ids; ``sizes``: bytes of the tensors by path."""

    encoder: IntEncoder
    config: Mapping[str, Any]
    path: Path
    sizes: Mapping[str, int]

    @torch.no_grad()
    def embed(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embeddings (batch, width) of length 1 for ``ids: (batch, tokens)``; ``keep`` False for padding.

        Integers up to the pooled vector; the division by its length is the first and only float.
        """
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep.bool()
        return torch.nn.functional.normalize(encode(self.encoder, ids, keep).double(), dim=1).float()

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @property
    def bytes(self) -> int:
        return (self.path / _FILE).stat().st_size


def is_integer(path: str | Path) -> bool:
    """Whether ``path`` is a directory of this format."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (config.get("quantization_config") or {}).get("format") == FORMAT


def write_integer(encoder: IntEncoder, checkpoint: Checkpoint, folder: Path) -> dict[str, int]:
    """Write ``encoder`` into ``folder`` with the tokenizer of ``checkpoint``; returns bytes by tensor."""
    tensors: dict[str, Tensor] = {}
    tree = _down(encoder, "", tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _FILE, tensors, {"format": "pt"})
    quantization = {"quant_method": "lissom", "version": 1, "format": FORMAT, "tree": tree}
    write_json(folder / "config.json", config_of(checkpoint, torch.float32, quantization))
    checkpoint.copy_assets(folder)
    return {name: t.numel() * t.element_size() for name, t in tensors.items()}


def load_encoder(path: str | Path) -> IntegerModel:
    """Read what :func:`write_integer` wrote. Raises :class:`FormatError` when it is not of this format or damaged."""
    folder = Path(path)
    if not is_integer(folder):
        raise FormatError(
            f"{path} holds no encoder in integers: make one with `lissom compress MODEL OUT --recipe ibert`"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    verify_file(folder / _FILE)
    tensors = load_file(folder / _FILE)
    try:
        encoder = _up(config["quantization_config"]["tree"], "", tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is damaged: {error!r} is missing or of another kind") from error
    if not isinstance(encoder, IntEncoder):
        raise FormatError(f"{path} is damaged: it does not describe an encoder")
    return IntegerModel(encoder, config, folder, {name: t.numel() * t.element_size() for name, t in tensors.items()})


def _down(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors by path."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            raise FormatError(f"{at} is not an integer")
        low, high = int(value.min()), int(value.max())
        kind = next(k for k in _SIZES if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max)
        tensors[at] = value.to(kind).contiguous()
        return "tensor"
    if type(value).__name__ in _TYPES:
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **_down(parts, at, tensors)}
    if isinstance(value, Mapping):
        return {key: _down(part, f"{at}.{key}" if at else key, tensors) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_down(part, f"{at}.{i}", tensors) for i, part in enumerate(value)]
    return value


def _up(tree: Any, at: str, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`_down`; integers are int64 in memory."""
    if tree == "tensor":
        return tensors[at].long()
    if isinstance(tree, Mapping):
        parts = {k: _up(part, f"{at}.{k}" if at else k, tensors) for k, part in tree.items() if k != "class"}
        return _TYPES[tree["class"]](**parts) if "class" in tree else parts
    if isinstance(tree, list):
        return tuple(_up(part, f"{at}.{i}", tensors) for i, part in enumerate(tree))
    return tree
