"""Structured pruning: whole heads, neurons or blocks go, and what is left is an ordinary smaller model."""

from ...core import Method
from .flap import FLAP, bias_of_removed, flap
from .head_importance import HeadImportance, head_importance
from .llm_pruner import LLMPruner, llm_pruner
from .magnitude import StructuredMagnitude, structured_magnitude
from .shortgpt import ShortGPT, influence, shortgpt

METHODS = {
    m.name: m
    for m in (
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
            "head-importance", "structured", "units", "heads by the gradient of their gate", "arXiv 1905.10650",
            HeadImportance, head_importance, needs=frozenset({"gradients"}),
        ),
        Method(
            "shortgpt", "structured", "blocks", "blocks that hardly turn the hidden state go", "arXiv 2403.03853",
            ShortGPT, shortgpt, needs=frozenset({"inputs"}),
        ),
    )
}  # fmt: skip

__all__ = ["METHODS", "bias_of_removed", "influence"]
