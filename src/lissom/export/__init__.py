"""Codecs: solved layers → tensors of a file format and back, bit for bit; and artefacts read and written by stream."""

from ..core import FormatError
from .compressed import CompressedTensors
from .dense import Dense
from .gptq import GPTQ
from .integer import IntegerModel, is_integer, load_encoder, write_integer
from .layout import Codec, LayerPlan, Layout, StoredLayer, form_name
from .opened import OpenedCheckpoint, open_model
from .packed import Packed, expected_bytes, packed_bits
from .restore import dtype_of, load, unpack
from .to_gguf import export_gguf
from .to_onnx import export_onnx
from .writer import ArtefactWriter

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (Dense(), Packed(), CompressedTensors(), CompressedTensors("int-quantized"), GPTQ(), GPTQ(version=2))
}


def codec_named(name: str) -> Codec:
    """The codec of a format; :class:`FormatError` lists the names when there is none."""
    if name not in CODECS:
        raise FormatError(f"unknown format {name!r}; choose one of {', '.join(CODECS)}")
    return CODECS[name]


__all__ = [
    "CODECS",
    "GPTQ",
    "ArtefactWriter",
    "Codec",
    "CompressedTensors",
    "Dense",
    "IntegerModel",
    "LayerPlan",
    "Layout",
    "OpenedCheckpoint",
    "Packed",
    "StoredLayer",
    "codec_named",
    "dtype_of",
    "expected_bytes",
    "export_gguf",
    "export_onnx",
    "form_name",
    "is_integer",
    "load",
    "load_encoder",
    "open_model",
    "packed_bits",
    "unpack",
    "write_integer",
]
