"""Structured pruning: whole heads, neurons or blocks go, and what is left is an ordinary smaller model."""

from ...core import Method
from .compresso import Compresso, compresso
from .flap import FLAP, flap
from .head_gates import HeadGates, head_gates
from .head_importance import HeadImportance, head_importance
from .l0 import L0, l0
from .llm_pruner import LLMPruner, llm_pruner
from .lorashear import LoRAShear, factor, lorashear
from .magnitude import StructuredMagnitude, structured_magnitude
from .random_units import RandomUnits, random_units
from .sheared import Sheared, sheared
from .shortgpt import ShortGPT, influence, shortgpt
from .surgeon_units import SurgeonUnits, surgeon_units
from .widths import widths

_TRAINED = frozenset({"gradients", "data", "training"})

METHODS = {
    m.name: m
    for m in (
        Method(
            "random", "structured", "units", "random heads, neurons or channels go (baseline)", "arXiv 1905.10650",
            RandomUnits, random_units,
        ),
        Method(
            "structured-magnitude", "structured", "units", "heads and neurons with the smallest weights go",
            "arXiv 1608.08710", StructuredMagnitude, structured_magnitude,
        ),
        Method(
            "flap", "structured", "units", "units that fluctuate least become a bias", "arXiv 2312.11983", FLAP, flap,
            needs=frozenset({"inputs"}),
        ),
        Method(
            "llm-pruner", "structured", "units", "units by first-order change of the loss", "arXiv 2305.11627",
            LLMPruner, llm_pruner, needs=frozenset({"gradients"}),
        ),
        Method(
            "surgeon-units", "structured", "units", "units by Kronecker curvature, the layer behind solved again",
            "arXiv 2312.17244", SurgeonUnits, surgeon_units, needs=frozenset({"gram", "gradients"}),
        ),
        Method(
            "head-importance", "structured", "units", "heads by the gradient of their gate", "arXiv 1905.10650",
            HeadImportance, head_importance, needs=frozenset({"gradients"}),
        ),
        Method(
            "shortgpt", "structured", "blocks", "blocks that hardly turn the hidden state go", "arXiv 2403.03853",
            ShortGPT, shortgpt, needs=frozenset({"inputs"}),
        ),
        Method(
            "l0", "structured", "gates", "gates on heads and neurons learned under one budget", "arXiv 1712.01312",
            L0, l0, needs=_TRAINED,
        ),
        Method(
            "head-gates", "structured", "gates", "gates on heads learned at a price for each", "arXiv 1905.09418",
            HeadGates, head_gates, needs=_TRAINED,
        ),
        Method(
            "sheared", "structured", "gates", "gates learned to a given shape, batches by domain", "arXiv 2310.06694",
            Sheared, sheared, needs=_TRAINED,
        ),
        Method(
            "compresso", "structured", "gates", "gates and low-rank updates, with a prompt", "arXiv 2310.05015",
            Compresso, compresso, needs=_TRAINED,
        ),
        Method(
            "lorashear", "structured", "projection", "redundant units shrink to zero while the rest learns",
            "arXiv 2310.18356", LoRAShear, lorashear, needs=_TRAINED,
        ),
    )
}  # fmt: skip

__all__ = ["METHODS", "factor", "influence", "widths"]
