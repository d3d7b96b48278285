"""Pruning: which weights become zero."""

from ...core import Method
from .magnitude import Magnitude, magnitude
from .sparsegpt import SparseGPT, sparsegpt
from .wanda import Wanda, wanda

_ALL = frozenset({"zeros", "codes"})

METHODS = {
    m.name: m
    for m in (
        Method(
            "magnitude", "prune", "solver", "smallest |w| become zero", "arXiv 2002.08307", Magnitude, magnitude,
            makes=_ALL,
        ),
        Method(
            "wanda", "prune", "solver", "|w| times input norm, compared by row", "arXiv 2306.11695", Wanda, wanda,
            needs=frozenset({"inputs"}), makes=_ALL, comparison="row",
        ),
        Method(
            "sparsegpt", "prune", "solver", "second-order choice with error feedback", "arXiv 2301.00774",
            SparseGPT, sparsegpt, needs=frozenset({"gram"}), makes=_ALL,
        ),
    )
}  # fmt: skip
