"""Healing: training that wins back what compression cost, under the mask and on the grid that it left."""

from ...core import Method
from .distil import Heal, heal
from .legal import Legal
from .reconstruct import Reconstruct, reconstruct

METHODS = {
    m.name: m
    for m in (
        Method(
            "reconstruct", "heal", "block", "kept weights of a block trained to give the dense block's output",
            "arXiv 2402.12419", Reconstruct, reconstruct, needs=frozenset({"gradients", "data", "training"}),
        ),
        Method(
            "heal", "heal", "training", "the whole compressed model trained against the dense one", "arXiv 1503.02531",
            Heal, heal, needs=frozenset({"gradients", "data", "teacher", "training"}),
        ),
    )
}  # fmt: skip

__all__ = ["METHODS", "Legal"]
