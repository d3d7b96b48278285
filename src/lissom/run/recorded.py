"""What a checkpoint records about a run beside its weights, in the engine's terms. Needs no torch of its own."""

from __future__ import annotations

from typing import Any

from .parts import Recorded

_STAGES = 4  # q k v, o, gate up, down
_CACHES = (8, 4)


def recorded(operators: Any, blocks: int) -> Recorded:
    """``operators``: :class:`lissom.models.operators.Operators` of a model with ``blocks`` blocks.

    A rotation of queries and keys changes nothing but what a rounded cache loses, so it needs no operator here.
    """
    out = Recorded()
    grid = operators.activations
    if grid is not None:
        out.inputs = [
            [
                (grid.bits, float(grid.scales.get(f"{block}.{stage}", 0.0))) if stage in grid.stages else (0, 0.0)
                for stage in range(_STAGES)
            ]
            for block in range(blocks)
        ]
    if operators.cache:
        keys, values = operators.cache
        same = all(g.bits == keys.bits and g.per == "token" and g.recent == 0 for g in operators.cache)
        if same and keys.bits in _CACHES:
            out.cache_bits = keys.bits
        else:
            words = (
                f"{name} of {g.bits} bits by {g.per}" + (f", the last {g.recent} tokens unrounded" if g.recent else "")
                for name, g in (("keys", keys), ("values", values))
            )
            out.cache_lacks = f"a cache with {' and '.join(words)}"
    return out
