"""A whole block whose layers are solved, as a method of kind ``block`` sees it: tensors and one function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .problem import Solved
from .stats import Stats

BlockForward = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class BlockProblem:
    """One block after its layers were solved, with two streams of hidden states.

    ``solved``: layer name → solution. ``inputs``: the block's inputs in the compressed model so far, ``dense_inputs``: the
    same tokens in the dense model, ``targets``: the dense block's outputs for ``dense_inputs``; lists of equal length of
    (batch, tokens, width). ``forward(weights, hidden) -> hidden``: the block with the given layers' weights (out, in) in
    place of its own; differentiable in both. ``free``: layers whose zeros may stand anywhere (no N:M pattern). ``number``: of the
    block, to be mixed into seeds. ``stats``: of the layers' inputs in the compressed stream, where a method needs them.
    """

    solved: Mapping[str, Solved]
    inputs: Sequence[Tensor]
    dense_inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    forward: BlockForward
    number: int = 0
    stats: Mapping[str, Stats] = field(default_factory=dict)
    free: Collection[str] = ()
