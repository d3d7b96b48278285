"""The vocabulary: tensors in, tensors out. Imports torch and nothing else of lissom."""

from .block import BlockForward, BlockProblem
from .constraint import NM, Both, Constraint, Fixed, Pattern, Sparse, Stack, both, keep_largest
from .errors import (
    CalibrationError,
    CheckpointError,
    FormatError,
    LissomError,
    NumericalError,
    OutputError,
    RecipeError,
)
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
    "CalibrationError",
    "CheckpointError",
    "Codes",
    "Columns",
    "Constraint",
    "Factor",
    "Fixed",
    "FormatError",
    "GateProblem",
    "Grid",
    "GridParams",
    "LayerSummary",
    "Levels",
    "LissomError",
    "LowRank",
    "Masked",
    "Method",
    "NumericalError",
    "OutputError",
    "Patched",
    "Pattern",
    "Plain",
    "Problem",
    "RecipeError",
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
