"""C++ kernels for packed weights, each beside its torch reference."""

from .packed import Form, Packed, PackedBinary, choose, extension


def isa() -> str:
    """The instruction set in use: "avx2", "portable", or "torch" when the C++ extension is not installed."""
    return "torch" if extension is None else extension.isa()


__all__ = ["Form", "Packed", "PackedBinary", "choose", "extension", "isa"]
