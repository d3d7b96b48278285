"""All published methods, one file each. Methods are pure functions of tensors and one frozen config."""

from ..core import Method
from . import allocate, heal, prune, quantize, structured

FAMILIES = {
    "prune": prune.METHODS,
    "quantize": quantize.METHODS,
    "allocate": allocate.METHODS,
    "structured": structured.METHODS,
    "heal": heal.METHODS,
}
METHODS: dict[str, Method] = {name: m for table in FAMILIES.values() for name, m in table.items()}

__all__ = ["FAMILIES", "METHODS"]
