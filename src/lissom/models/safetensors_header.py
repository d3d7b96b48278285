"""Headers of safetensors files, with a check that the file is as long as its header says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int


def read_header(path: Path) -> dict[str, Entry]:
    """Name → entry of every tensor; raises :class:`CheckpointError` for a damaged or truncated file."""
    length = path.stat().st_size
    again = "download or copy it again"
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or not 2 <= size <= _MAX_HEADER or length < 8 + size:
            raise CheckpointError(f"{path} is truncated or not safetensors ({length} bytes); {again}")
        try:
            raw = json.loads(file.read(size))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged safetensors header ({error}); {again}") from error
    raw.pop("__metadata__", None)
    end = max((item["data_offsets"][1] for item in raw.values()), default=0)
    if length < 8 + size + end:
        raise CheckpointError(f"{path} is truncated: {length} bytes, its header promises {8 + size + end}; {again}")
    entries = {}
    for name, item in raw.items():
        dtype = _DTYPES.get(item["dtype"])
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name} has dtype {item['dtype']}; known: {', '.join(_DTYPES)}")
        start, stop = item["data_offsets"]
        entry = Entry(tuple(item["shape"]), dtype, stop - start)
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: tensor {name} has {entry.size} bytes, which its shape contradicts; {again}")
        entries[name] = entry
    return entries
