"""The vocabulary: tensors in, tensors out. Imports torch and nothing else of lissom.

Errors are here at once; the first other name loads torch and all of :mod:`lissom.core.vocabulary`. So the command line
and the runtime start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CalibrationError,
    CheckpointError,
    FormatError,
    LissomError,
    NumericalError,
    OutputError,
    RecipeError,
)

if TYPE_CHECKING:
    from .vocabulary import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lissom.core' has no attribute {name!r}")
    vocabulary = import_module("lissom.core.vocabulary")
    # all at once: `sweep` is a function and the module that it lives in, which imports leave in its place here
    globals().update({key: getattr(vocabulary, key) for key in __all__ if hasattr(vocabulary, key)})
    return globals()[name]


__all__ = [
    "HOST",
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
    "NMByRow",
    "NumericalError",
    "Orthogonal",
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
    "Side",
    "Solved",
    "Sparse",
    "Stack",
    "Stacked",
    "Stats",
    "Stored",
    "Tally",
    "TwoLevel",
    "UnitProblem",
    "Units",
    "add_gram",
    "both",
    "damped",
    "device_named",
    "factorise",
    "gram_product",
    "grid_of",
    "histogram_entropy",
    "is_finite",
    "keep_largest",
    "merge",
    "mirrored",
    "moved",
    "on",
    "room",
    "side",
    "stored_bits",
    "sweep",
    "two_sided",
]
