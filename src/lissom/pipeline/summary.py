"""What a manifest says of the process that made it."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the numbers."""
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "compressed-tensors")},
    }


def peak_memory() -> int:
    """Resident bytes of this process at their highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
