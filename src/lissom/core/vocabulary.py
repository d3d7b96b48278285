"""Every name of the vocabulary that needs torch; :mod:`lissom.core` hands them out."""

from .block import BlockForward, BlockProblem
from .constraint import NM, Both, Constraint, Fixed, Pattern, Sparse, Stack, both, keep_largest
from .factor import Factor, damped, factorise
from .grid import Codes, Grid, GridParams
from .method import Method
from .problem import Budget, LayerSummary, Problem, Solved
from .rotation import Rotation
from .stats import Stats, gram_product, merge
from .stored import (
    Affine,
    Binary,
    Columns,
    Levels,
    LowRank,
    Masked,
    Patched,
    Plain,
    Rotated,
    Scaled,
    Second,
    Stacked,
    Stored,
    TwoLevel,
    stored_bits,
)
from .sweep import sweep
from .units import GateProblem, UnitProblem, Units

__all__ = [
    "NM",
    "Affine",
    "Binary",
    "BlockForward",
    "BlockProblem",
    "Both",
    "Budget",
    "Codes",
    "Columns",
    "Constraint",
    "Factor",
    "Fixed",
    "GateProblem",
    "Grid",
    "GridParams",
    "LayerSummary",
    "Levels",
    "LowRank",
    "Masked",
    "Method",
    "Patched",
    "Pattern",
    "Plain",
    "Problem",
    "Rotated",
    "Rotation",
    "Scaled",
    "Second",
    "Solved",
    "Sparse",
    "Stack",
    "Stacked",
    "Stats",
    "Stored",
    "TwoLevel",
    "UnitProblem",
    "Units",
    "both",
    "damped",
    "factorise",
    "gram_product",
    "keep_largest",
    "merge",
    "stored_bits",
    "sweep",
]
