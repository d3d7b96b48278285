"""Steps of kind ``block``: after a block's layers are solved, work on the block as a whole against the dense one.

A second stream goes along, of the dense model: its hidden states enter the dense block, and what comes out is the target.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..core import HOST, BlockForward, BlockProblem, NumericalError, is_finite, moved, on
from ..models import Block
from .recipe import Recipe, Step
from .stream import LayerResult


def block_steps(recipe: Recipe) -> list[Step]:
    return [s for s in recipe.steps if s.method.kind == "block"]


def forward_of(block: Block) -> BlockForward:
    """The block as a function of some of its layers' weights (out, in) and its input; everything else as it is now."""
    base = dict(block.parameters)

    def forward(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        view = copy.copy(block)
        view.parameters = base | {f"{name}.weight": w for name, w in weights.items()}
        return view.forward(hidden)

    return forward


def dense_targets(block: Block, dense: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the block as it is in the dense model, which has no operators."""
    operators, block.operators = block.operators, None
    targets = [block.forward(h) for h in dense]
    block.operators = operators
    return targets


def work_on_block(
    block: Block,
    results: Sequence[LayerResult],
    inputs: Sequence[Tensor],
    dense_inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: Sequence[Step],
) -> list[LayerResult]:
    """The results with the solutions that the chain of block steps makes of them."""
    device = block.device
    solved = {r.layer.name: moved(r.solved, device) for r in results}
    free = frozenset(r.layer.name for r in results if r.pattern == "unstructured")
    forward = forward_of(block)
    for step in steps:
        problem = BlockProblem(solved, inputs, dense_inputs, targets, forward, block.number, free=free)
        with on(device):
            solved = step.method.run(problem, step.config)
        for name, one in solved.items():
            if not is_finite(one.weight):
                raise NumericalError(f"{step.name} made non-finite weights in {name}; lower its learning_rate")
    return [replace(r, solved=moved(solved[r.layer.name], HOST), notes=solved[r.layer.name].notes) for r in results]
