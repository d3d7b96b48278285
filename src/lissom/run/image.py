"""Images: packed weights and a tokenizer in one file that is ready to run, so that a start takes milliseconds.

Its data is read into huge pages, which on the machine where this was measured the processor reads twice as fast as small ones.
It is mapped instead, shared between processes and read page by page, where memory is short or ``LISSOM_MAP=1`` asks for it.

An image is a copy that can be made again at any time from its checkpoint. Its layout is that of the kernels of one build
of lissom; checkpoints keep the neutral form. The parts of a file:

    magic (8 bytes) | u64 length and u32 CRC-32 of the header | header (JSON) | zeros to a multiple of 64 | data

The header gives for each matrix its place in the data and the numbers that :func:`Matrix.borrow` checks.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..core.errors import FormatError
from ..kernels.native import extension
from .parts import ALIGN, ROLES, VECTORS, BlockParts, Layers, Parts, Recorded
from .tokenizer import Tokenizer, describe

MAGIC = b"LISSOMI2"
_HEAD = struct.Struct("<8sQI")


def write_image(parts: Parts, path: Path) -> bool:
    """Write ``parts`` to ``path``, whole or not at all. False when the tokenizer cannot be kept in an image.

    Raises ``OSError`` when the file cannot be written.
    """
    kept = describe(parts.tokenizer())
    if kept is None:
        return False
    data, special, template = kept
    blobs: list[Any] = []
    at = 0

    def put(blob: Any, size: int) -> list[int]:
        nonlocal at
        place = [at, size]
        blobs.append(blob)
        at += -(-size // ALIGN) * ALIGN
        return place

    def matrix(m: Any) -> list[Any]:
        kind = "matrix" if isinstance(m, _native().Matrix) else "binary"
        return [kind, list(m.parts), *put(m.data, m.data.size)]

    blocks = []
    for block in parts.blocks:
        vectors = {name: np.asarray(block.vectors[name], np.float32) for name in VECTORS}
        blocks.append(
            {
                "weights": {role: matrix(block.weights[role]) for role in ROLES},
                "vectors": {name: put(v, v.nbytes) for name, v in vectors.items()},
            }
        )
    norm, frequency = np.asarray(parts.norm, np.float32), np.asarray(parts.frequency, np.float32)
    header = {
        "source": parts.source, "sizes": parts.sizes, "limit": parts.limit, "blocks": blocks,
        "embedding": matrix(parts.embedding),
        "head": None if parts.head is parts.embedding else matrix(parts.head),
        "norm": put(norm, norm.nbytes), "frequency": put(frequency, frequency.nbytes),
        "ends": sorted(parts.ends()), "tokenizer": put(data, len(data)), "special": special,
        "chat_template": template,
        "layers": {"forms": parts.layers.forms, "bytes": parts.layers.bytes, "rounded": parts.layers.rounded},
        "recorded": vars(parts.recorded), "size": at,
    }  # fmt: skip
    text = json.dumps(header).encode()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(MAGIC, len(text), zlib.crc32(text)))
            file.write(text)
            _fill(file)
            for blob in blobs:
                file.write(memoryview(blob).cast("B") if len(blob) else b"")
                _fill(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return True


def read_image(path: Path) -> Parts:
    """Map an image. Raises :class:`FormatError` when the file is not one, or is cut short."""
    with path.open("rb") as file, _named(path):
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or head[:8] != MAGIC:
            raise ValueError("it does not begin like one")
        _, length, checksum = _HEAD.unpack(head)
        text = file.read(min(length, os.fstat(file.fileno()).st_size))
        if len(text) != length or zlib.crc32(text) != checksum:
            raise ValueError("its header is damaged")
        header = json.loads(text)
        start = -(-(_HEAD.size + length) // ALIGN) * ALIGN
        if os.fstat(file.fileno()).st_size < start + header["size"]:
            raise ValueError("it is cut short")
        data = _data(file, start, header["size"])

        def cut(place: list[int]) -> np.ndarray:
            return data[place[0] : place[0] + place[1]]

        def matrix(entry: list[Any]) -> Any:
            kind, numbers, *place = entry
            native = _native()
            return (native.Matrix if kind == "matrix" else native.Bcq).borrow(*numbers, cut(place))

        def vector(place: list[int]) -> list[float]:
            return cut(place).view(np.float32).tolist()

        blocks = [
            BlockParts(
                {role: matrix(block["weights"][role]) for role in ROLES},
                {name: vector(block["vectors"][name]) for name in VECTORS},
            )
            for block in header["blocks"]
        ]
        embedding = matrix(header["embedding"])
        head_matrix = embedding if header["head"] is None else matrix(header["head"])
        sizes = {k: float(v) if isinstance(v, float) else int(v) for k, v in header["sizes"].items()}
        words = cut(header["tokenizer"])
        return Parts(
            header["source"], sizes, header["limit"], blocks, embedding, head_matrix, vector(header["norm"]),
            vector(header["frequency"]), lambda: frozenset(header["ends"]),
            lambda: Tokenizer(words.tobytes(), header["special"], header["chat_template"]), Layers(**header["layers"]),
            recorded=_recorded(header["recorded"]),
        )  # fmt: skip


def _data(file: BinaryIO, start: int, size: int) -> np.ndarray:
    """The data of an image: read into huge pages, or mapped where memory is short or ``LISSOM_MAP`` asks for it."""
    if os.environ.get("LISSOM_MAP", "") in ("", "0") and 2 * size < available():
        data = _native().memory(size)
        file.seek(start)
        if file.readinto(memoryview(data)) != size:  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("it is cut short")
        return data
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapped, np.uint8)[start:]


def available() -> int:
    """Bytes of memory that are free or can be made free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration, ValueError):
        return 1 << 62


def _recorded(data: dict[str, Any]) -> Recorded:
    inputs = [[(int(bits), float(scale)) for bits, scale in block] for block in data["inputs"]]
    return Recorded(inputs, data["cache_bits"], data["cache_lacks"])


def _native() -> Any:
    assert extension is not None
    return extension


def _fill(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGN))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no image that this lissom can map: {error}; delete it") from error
