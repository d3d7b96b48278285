"""Every name of the vocabulary that needs torch; :mod:`lissom.core` hands them out, by the list there."""

# ruff: noqa: F401

from .block import BlockForward, BlockProblem
from .constraint import NM, Both, Constraint, Fixed, NMByRow, Pattern, Sparse, Stack, both, keep_largest
from .factor import Factor, Side, damped, factorise, side
from .finite import is_finite
from .grid import Codes, Grid, GridParams
from .method import Method
from .place import HOST, device_named, moved, on, room
from .problem import Budget, LayerSummary, Problem, Solved
from .rotation import Orthogonal, Rotation
from .stats import Stats, Tally, add_gram, gram_product, histogram_entropy, merge, mirrored
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
    grid_of,
    stored_bits,
)
from .sweep import sweep
from .two_sided import two_sided
from .units import GateProblem, UnitProblem, Units
