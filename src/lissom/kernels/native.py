"""The C++ extension, or None where lissom was installed without a compiler. Needs no torch."""

from types import ModuleType

from ..core.errors import LissomError

try:
    from . import _C  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # the torch reference does the work then
    _C = None

extension: ModuleType | None = _C


def isa() -> str:
    """The instruction set in use: the best that this processor and this build have, or the one that ``LISSOM_ISA`` names.

    "avx512", "avx2", "neon_dot", "neon", "portable"; "torch" when the C++ extension is not installed. Raises
    :class:`LissomError` when ``LISSOM_ISA`` names another.
    """
    if extension is None:
        return "torch"
    try:
        return extension.isa()
    except ValueError as error:
        raise LissomError(str(error)) from error
