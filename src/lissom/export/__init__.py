"""Codecs: solved layers → tensors of a file format and back, bit for bit; and artefacts read and written by stream."""

from ..core import FormatError
from .compressed import CompressedTensors
from .dense import Dense
from .layout import Codec, LayerPlan, Layout, StoredLayer
from .opened import OpenedCheckpoint, open_model
from .packed import Packed, expected_bytes, packed_bits
from .restore import load, unpack
from .to_gguf import export_gguf
from .writer import ArtefactWriter

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Dense(), Packed(), CompressedTensors(), CompressedTensors("int-quantized"))
}


def codec_named(name: str) -> Codec:
    """The codec of a format; :class:`FormatError` lists the names when there is none."""
    if name not in CODECS:
        raise FormatError(f"unknown format {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name]


__all__ = [
    "CODECS",
    "ArtefactWriter",
    "Codec",
    "CompressedTensors",
    "Dense",
    "LayerPlan",
    "Layout",
    "OpenedCheckpoint",
    "Packed",
    "StoredLayer",
    "codec_named",
    "expected_bytes",
    "export_gguf",
    "load",
    "open_model",
    "packed_bits",
    "unpack",
]
