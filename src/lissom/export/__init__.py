"""Codecs: solved layers → tensors of a file format and back, bit for bit; and artefacts read and written by stream."""

from .dense import Dense
from .layout import Codec, LayerPlan, Layout, StoredLayer
from .packed import Packed

__all__ = ["Codec", "Dense", "LayerPlan", "Layout", "Packed", "StoredLayer"]
