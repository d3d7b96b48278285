"""Healing: training that wins back what compression cost, under the mask and on the grid that it left."""

from ...core import Method
from .legal import Legal
from .reconstruct import Reconstruct, reconstruct

METHODS = {
    m.name: m
    for m in (
        Method(
            "reconstruct", "heal", "block", "kept weights of a block trained to give the dense block's output",
            "arXiv 2402.12419", Reconstruct, reconstruct, needs=frozenset({"gradients", "data", "training"}),
        ),
    )
}  # fmt: skip

__all__ = ["METHODS", "Legal"]
