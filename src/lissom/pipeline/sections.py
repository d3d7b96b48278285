"""The sections of a recipe beside its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Save:
    """``format`` packed|dense|compressed-tensors|int-quantized|gptq|gptq-v2; ``dtype`` of what is not quantized: auto|float16|bfloat16|float32;
    ``embedding_bits`` 2–8 quantizes embedding and head by rounding to nearest (packed only), 16 leaves them."""

    format: str = "dense"
    dtype: str = "auto"
    embedding_bits: int = 16
    embedding_group_size: int = 64


NONE = "none"  # of calibration text


@dataclass(frozen=True)
class Calibration:
    """``data`` a name or file, or "none": no text, inputs are taken as white; ``samples`` × ``length`` tokens; ``allocation_samples`` for the pass of an
    allocation (None: a quarter, at least 8); ``statistics`` of a layer's inputs after all ``stage``s before it were
    compressed, or once per ``block``, before any of its layers; ``token_fisher``: exponent of g · g, g the loss's gradient, as a token counts;
    ``drift``: 0 … 1, the share of what a layer's inputs have lost that its weights make up for (:mod:`.drift`)."""

    data: str = "builtin"
    samples: int = 128
    length: int = 512
    seed: int = 0
    allocation_samples: int | None = None
    statistics: Literal["stage", "block"] = "stage"
    token_fisher: float = 0.0
    drift: float = 0.0


SECTIONS = {
    "save": Save,
    "calibration": Calibration,
}  # whose settings a bare key of ``--set`` reaches when no step has them
