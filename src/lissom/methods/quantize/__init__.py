"""Quantization: which levels weights may take."""

from ...core import Method
from .gptq import GPTQ, gptq
from .rtn import RTN, rtn

_CODES = frozenset({"codes"})

METHODS = {
    m.name: m
    for m in (
        Method("rtn", "quantize", "solver", "round to nearest", "baseline", RTN, rtn, makes=_CODES),
        Method(
            "gptq", "quantize", "solver", "rounding with error feedback", "arXiv 2210.17323", GPTQ, gptq,
            needs=frozenset({"gram"}), makes=_CODES,
        ),
    )
}  # fmt: skip
