"""Headers of GGUF files: metadata and where each tensor lies, in milliseconds.

``gguf.GGUFReader`` makes numpy objects of every token of the vocabulary (seconds for 49,000 tokens) and maps the whole
file; here arrays of strings are only walked over, and tensors are read when asked for. Format: the GGUF specification in
the ggml repository, docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    dequantize,
    quant_shape_to_byte_shape,
)

from ..core import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
_MAX_COUNT = 1 << 24  # of anything that is counted: a damaged header must not eat the memory
_MAX_STRING = 1 << 26


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: ``shape`` with the slowest dimension first, ``start`` in bytes from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """Shape of the data as numbers (F32, F16 …) or, when quantized, as rows of bytes."""
        plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        return self.shape if self.kind in plain else quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of codes."""
        return GGML_QUANT_SIZES[self.kind][1]

    @property
    def size(self) -> int:
        width = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2}.get(self.kind, 1)
        return math.prod(self.bytes_shape) * width


@dataclass(frozen=True)
class Header:
    """``metadata``: scalars and strings; of arrays only the length, as ``lengths[key]``."""

    path: Path
    metadata: dict[str, Any]
    types: dict[str, GGUFValueType]
    lengths: dict[str, int]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def read(self, name: str) -> np.ndarray:
        """Tensor ``name`` dequantized to fp32 by gguf's reference code."""
        item = self.tensors[name]
        dtype = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}.get(item.kind, "u1")
        data = np.fromfile(self.path, dtype=dtype, count=math.prod(item.bytes_shape), offset=item.start)
        if dtype == "u1":
            # gguf works on sixteen rows at a time: with long rows its cost is the arithmetic, not the calls
            count = data.size // item.block_bytes
            together = next(n for n in range(min(count, 1024), 0, -1) if count % n == 0)
            data = data.reshape(-1, together * item.block_bytes)
        else:
            data = data.reshape(item.bytes_shape)
        return dequantize(data, item.kind).astype(np.float32, copy=False).reshape(item.shape)

    def problems(self) -> list[str]:
        """Tensors that end after the end of the file."""
        length = self.path.stat().st_size
        return [
            f"{self.path} is truncated: tensor {t.name} ends at byte {t.start + t.size} of {length}; get it again"
            for t in self.tensors.values()
            if t.start + t.size > length
        ]


def read_gguf_header(path: Path) -> Header:
    """Parse the header; raises :class:`CheckpointError` when the file is not GGUF, truncated in its header, or damaged."""
    try:
        with path.open("rb") as file:
            return _parse(path, file)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: truncated or damaged ({error})") from error


def _parse(path: Path, file: BinaryIO) -> Header:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = _number(file, "I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    tensor_count, key_count = _count(file), _count(file)
    metadata: dict[str, Any] = {}
    types: dict[str, GGUFValueType] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        key, kind = _string(file), GGUFValueType(_number(file, "I"))
        types[key] = kind
        if kind == GGUFValueType.ARRAY:
            lengths[key] = _skip_array(file)
        else:
            metadata[key] = _string(file) if kind == GGUFValueType.STRING else _number(file, _SCALARS[kind])
    found = []
    for _ in range(tensor_count):
        name = _string(file)
        dimensions = _number(file, "I")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(_number(file, "Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, GGMLQuantizationType(_number(file, "I")), _number(file, "Q")))
    alignment = int(metadata.get("general.alignment", 32))
    base = -(-file.tell() // alignment) * alignment
    return Header(path, metadata, types, lengths, {n: Stored(n, s, k, base + at) for n, s, k, at in found})


def _number(file: BinaryIO, code: str) -> Any:
    code = "<" + code
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _count(file: BinaryIO) -> int:
    value = _number(file, "Q")
    if value > _MAX_COUNT:
        raise ValueError(f"a count of {value}")
    return value


def _string(file: BinaryIO) -> str:
    return _bytes(file).decode("utf-8", errors="replace")


def _bytes(file: BinaryIO) -> bytes:
    length = _number(file, "Q")
    if length > _MAX_STRING:
        raise ValueError(f"a string of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("the file ends inside a string")
    return data


def _skip_array(file: BinaryIO) -> int:
    kind, count = GGUFValueType(_number(file, "I")), _count(file)
    if kind == GGUFValueType.STRING:
        for _ in range(count):
            _bytes(file)
    elif kind == GGUFValueType.ARRAY:
        for _ in range(count):
            _skip_array(file)
    else:
        file.seek(count * struct.calcsize("<" + _SCALARS[kind]), 1)
    return count


@contextmanager
def slim_copy(header: Header) -> Iterator[Path]:
    """A GGUF file with the scalar metadata only, for transformers' config reader, which parses all it is given.

    What that reader takes from the rest is put in: the size of the vocabulary, and whether there is an output matrix.
    """
    adders = {
        GGUFValueType.UINT8: "add_uint8", GGUFValueType.INT8: "add_int8", GGUFValueType.UINT16: "add_uint16",
        GGUFValueType.INT16: "add_int16", GGUFValueType.UINT32: "add_uint32", GGUFValueType.INT32: "add_int32",
        GGUFValueType.UINT64: "add_uint64", GGUFValueType.INT64: "add_int64", GGUFValueType.FLOAT32: "add_float32",
        GGUFValueType.FLOAT64: "add_float64", GGUFValueType.BOOL: "add_bool", GGUFValueType.STRING: "add_string",
    }  # fmt: skip
    architecture = header.architecture
    with tempfile.TemporaryDirectory(prefix="lissom-") as folder:
        path = Path(folder) / "slim.gguf"
        writer = GGUFWriter(path, architecture)
        for key, value in header.metadata.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "tokenizer.chat_template"):
                continue
            if value != "":
                getattr(writer, adders[header.types[key]])(key, value)
        vocab = f"{architecture}.vocab_size"
        if vocab not in header.metadata and "tokenizer.ggml.tokens" in header.lengths:
            writer.add_uint32(vocab, header.lengths["tokenizer.ggml.tokens"])
        writer.add_tensor("output.weight" if "output.weight" in header.tensors else "none", np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield path
