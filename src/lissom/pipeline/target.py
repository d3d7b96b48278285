"""What a run should come to – a size, bits per weight, or a loss – instead of settings from which that follows.

    target: {size: 60MB}            # or {bits: 2.2}, or {max_kl: 0.5}

A recipe with a target keeps its solvers and their settings; sparsity and bits of every layer and the bits of the embedding
are chosen from measured curves (:mod:`.sizing`), so allocations, sparsity and bits of the recipe do not count. One step does
both, or one makes the zeros and a second one the codes (:func:`parts`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Step

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_CHOSEN = ("sparsity", "bits", "pattern", "embedding_bits")  # settings that a target decides


@dataclass(frozen=True)
class Target:
    """One of ``size`` (bytes of the weight files: a number, or text such as "60MB"), ``bits`` (8 · bytes / parameters),
    ``max_kl`` (nats a token against the dense model on held-out calibration text).

    ``tilts``: how much less the loss of the last block counts than that of the first, e^−tilt; each is tried, the lowest measured
    loss wins. ``measure`` false: no trials, the prediction of the curves is taken (sizes only).
    """

    size: float | str | None = None
    bits: float | None = None
    max_kl: float | None = None
    tilts: tuple[float, ...] = (0.0, 1.0)
    measure: bool = True

    def bytes(self, parameters: int) -> float | None:
        """The size asked for, or None for a loss."""
        if self.size is not None:
            return parse_size(self.size)
        return None if self.bits is None else self.bits * parameters / 8


def parse_size(text: float | str) -> float:
    """Bytes of "60MB", "1.5 GiB", "60000000" or a number. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kmg]?i?b?)\s*", str(text), re.IGNORECASE)
    unit = found[2].lower() if found else "?"
    try:
        size = float(found[1]) * _UNITS[unit] if found else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"{text!r} is no size; write bytes or a number with kB, MB, GB, KiB, MiB or GiB, such as 60MB")
    return size


def parts(steps: Sequence[Step]) -> tuple[int | None, int]:
    """Where the zeros and where the codes are made: positions in ``steps``; the first is None where nothing prunes."""
    solvers = [i for i, s in enumerate(steps) if s.method.kind == "solver"]
    return (solvers[0] if "zeros" in steps[solvers[0]].method.makes else None), solvers[-1]


def problems_of(target: Target, steps: Sequence[Step], format: str, overrides: Sequence[str]) -> list[str]:
    """Why the target and the rest of the recipe do not go together."""
    out: list[str] = []
    given = {k: v for k in ("size", "bits", "max_kl") if (v := getattr(target, k)) is not None}
    if len(given) != 1:
        names = " and ".join(f"{k} = {v}" for k, v in given.items()) or "nothing"
        out.append(f"target: give one of size, bits and max_kl, not {names}")
    if target.size is not None:
        try:
            parse_size(target.size)
        except ValueError as error:
            out.append(f"target: {error}")
    for key in ("bits", "max_kl"):
        value = getattr(target, key)
        if value is not None and not 0 < value < math.inf:
            out.append(f"target: {key} must be a positive number, not {value:g}")
    if target.max_kl is not None and not target.measure:
        out.append("target: max_kl is a measured loss; drop measure=false")
    if not target.tilts or not all(isinstance(t, int | float) and 0 <= t < 20 for t in target.tilts):
        out.append(f"target: tilts must be numbers from 0 to 20, at least one, not {list(target.tilts)}")
    for text in overrides:
        owner, _, key = text.partition("=")[0].strip().rpartition(".")
        if key in _CHOSEN and owner != "target":
            out.append(f"--set {text!r}: the target chooses {key}; drop one of the two")
    solvers = [s for s in steps if s.method.kind == "solver"]
    names = ", ".join(s.name for s in solvers) or "none"
    if not 1 <= len(solvers) <= 2 or (len(solvers) == 2 and "zeros" not in solvers[0].method.makes):
        out.append(
            f"target: needs a recipe with exactly one pruning or quantization step, or one that prunes and one that rounds, "
            f"not {names}; such as the recipes budget, sparsegpt or gptq"
        )
    elif "codes" not in solvers[-1].method.makes or "forms" in solvers[-1].method.makes:
        out.append(
            f"target: {solvers[-1].name} makes no integer codes; use a recipe with gptq-descent, sparsegpt, gptq or rtn"
        )
    elif len({(s.constraint.only, s.constraint.ignore) for s in solvers}) > 1:
        out.append(f"target: {names} must touch the same layers; give both the same `only` and `ignore`")
    smaller = [s.name for s in steps if s.method.kind in ("units", "blocks")]
    if smaller:
        out.append(
            f"target: {smaller[0]} takes away units before layers are measured; compress its result in a second run"
        )
    if format != "packed":
        out.append(f"target: needs format packed, where zeros take no space; {format} keeps them (--format packed)")
    return out
