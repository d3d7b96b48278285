"""The C++ extension, or None where lissom was installed without a compiler. Needs no torch."""

from types import ModuleType

try:
    from . import _C  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # the torch reference does the work then
    _C = None

extension: ModuleType | None = _C


def isa() -> str:
    """The instruction set in use: "avx2", "portable", or "torch" when the C++ extension is not installed."""
    return "torch" if extension is None else extension.isa()
