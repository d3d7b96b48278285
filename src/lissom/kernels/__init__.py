"""C++ kernels for packed weights, each beside its torch reference. torch is loaded with the first packed matrix."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .native import extension, isa

if TYPE_CHECKING:
    from .packed import Form, Packed, PackedBinary, choose

__all__ = ["Form", "Packed", "PackedBinary", "choose", "extension", "isa"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lissom.kernels' has no attribute {name!r}")
    return getattr(import_module("lissom.kernels.packed"), name)
