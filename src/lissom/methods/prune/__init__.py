"""Pruning: which weights become zero."""

from ...core import Method
from .alps import ALPS, alps
from .magnitude import Magnitude, magnitude
from .refit import Refit, refit
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
        Method(
            "refit", "prune", "solver", "best weights under the mask of the step before", "normal equations",
            Refit, refit, needs=frozenset({"gram"}), makes=_ALL,
        ),
        Method(
            "alps", "prune", "solver", "zeros by ADMM, then the best weights", "arXiv 2406.07831", ALPS, alps,
            needs=frozenset({"gram"}), makes=_ALL,
        ),
    )
}  # fmt: skip
