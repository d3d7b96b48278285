"""The vocabulary: tensors in, tensors out. Imports torch and nothing else of lissom."""

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
from .stats import Stats, gram_product, merge
from .sweep import sweep

__all__ = [
    "NM",
    "Both",
    "Budget",
    "CalibrationError",
    "CheckpointError",
    "Codes",
    "Constraint",
    "Factor",
    "Fixed",
    "FormatError",
    "Grid",
    "GridParams",
    "LayerSummary",
    "LissomError",
    "Method",
    "NumericalError",
    "OutputError",
    "Pattern",
    "Problem",
    "RecipeError",
    "Solved",
    "Sparse",
    "Stack",
    "Stats",
    "both",
    "damped",
    "factorise",
    "gram_product",
    "keep_largest",
    "merge",
    "sweep",
]
