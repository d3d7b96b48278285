"""safetensors files that are whole or absent, equal for equal tensors, and carry a checksum of their data.

The library writes metadata in the random order of a hash map; sorted here, so that the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError, FormatError, OutputError
from ..models.safetensors_header import Entry, read_header

CHECKSUM = "sha256"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_CHUNK = 1 << 24


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write ``tensors`` (widest types first, then by name) and return the size of the file.

    The file appears under ``path`` only when it is on the disk. Raises :class:`OutputError` when it cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    digest, at = hashlib.sha256(), 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise FormatError(f"{name} has dtype {tensor.dtype}, which safetensors files of lissom do not hold")
        data = _raw(tensor)
        digest.update(data)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + data.nbytes],
        }
        at += data.nbytes
    known = dict(sorted({"format": "pt", CHECKSUM: digest.hexdigest(), **metadata}.items()))
    text = json.dumps({"__metadata__": known, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                file.write(_raw(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path} ({at / 1e6:.1f} MB): {error.strerror or error}. What is finished is kept: "
            "make room and run the same command again"
        ) from error
    return 8 + len(text) + at


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty when there is none or the header is damaged."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            return dict(json.loads(file.read(min(size, path.stat().st_size))).get("__metadata__", {}))
        except (ValueError, AttributeError):
            return {}


def verify_file(path: Path) -> dict[str, Entry]:
    """The header of ``path``; raises :class:`FormatError` when the file is truncated or its data has changed.

    Files without a checksum (of other tools) are checked for their length only.
    """
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise FormatError(str(error)) from error
    wanted = read_metadata(path).get(CHECKSUM)
    if wanted is None:
        return header
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise FormatError(f"{path} is damaged: its data does not match its checksum; copy or make it again")
    return header


def _raw(tensor: Tensor) -> Any:
    """The tensor's bytes without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (flat.view(torch.uint8) if flat.numel() else flat.new_zeros(0, dtype=torch.uint8)).numpy()
