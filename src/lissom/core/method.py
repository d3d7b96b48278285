"""One row of a family's ``METHODS`` table: a published method, its settings and its function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """``name`` in recipes; ``summary`` one line; ``source`` the paper; ``config`` a frozen dataclass of settings.

    ``kind`` says what ``run`` is, and so where the pipeline calls it:

    =============  ==========================================================================
    ``solver``     ``run(problem: Problem, config) -> Solved``, layer by layer while blocks stream by
    ``allocation`` ``run(layers: list[LayerSummary], target: float, config) -> Budget``; with
                   ``summarise(problems: list[Problem], target: float, config) -> list[dict[str, float]]`` per block
                   (one dict for each name of each problem, in order)
    ``block``      ``run(problem: BlockProblem, config) -> dict[str, Solved]``, after a block's layers were solved:
                   sees the whole block with its dense inputs and outputs; keeps masks and grids
    ``training``   ``run(student: Outputs, teacher: Outputs | None, ids, config) -> Tensor``: the loss of one batch, by which
                   the pipeline trains the finished model on its masks and grids
    ``units``      ``run(problem: UnitProblem, config) -> Tensor``: scores of the heads or neurons of one block, before
                   anything else; ``keep_heads`` and ``keep_neurons`` of the config say how many remain
    ``blocks``     ``run(influences: list[float], config) -> list[int]``: the blocks that remain
    ``gates``      ``run(problem: GateProblem, config) -> Tensor``: gaps (n,) between the expected and the wanted sparsity of
                   gates that are trained with the model, before anything else; each is held at zero by two
                   multipliers, or weighed by the config's ``penalty`` where it has one
    ``projection`` ``run(before: Tensor, trial: Tensor, config) -> Tensor``: which units (units,) a step of training, from
                   ``before`` to ``trial`` (units, entries), sends to zero for good
    ``fold``       of a solver with ``fold``, in a step without bits: see there
    ``rotation``   ``run(config, width, head, inner) -> Turns``: rotations that are fused into the weights before anything else, or
                   left to the run
    ``operator``   ``run(x, …)``: what the run does to activations or to the cache, simulated; the step is recorded in the
                   artefact, and every forward pass honours it
    ``permutation`` ``run(weight, norm, columns, segments, n, m, config) -> (order, before, after)``: an order of the channels that a
                   layer reads, before anything else; the pipeline folds it into the weights on both sides
    ``integer``    ``run(encoder, seen, config) -> IntEncoder``: the whole encoder in integers, from its float weights and the
                   largest magnitudes of its activations; the only step of its recipe
    =============  ==========================================================================

    ``needs``: any of "gram", "inputs" (norms and means only), "sample" (of a fold: tokens of the inputs in ``Problem.extras``),
    "entropy" (of the inputs' histograms, in as many bins as the config says), "gradients", "data", "teacher", "training"; of an allocation also
    "blocks": whole blocks, see ``learn``; "score": that of the solver after it, in each problem's ``extras``; "trials": ``run`` gets a fourth argument,
    ``measure(budget, layers, target, label) -> float``, the held-out loss of the model pruned by a cheap method (``trial``,
    ``trial_samples`` and ``trial_windows`` of its config) under that budget.
    ``score``: of a solver that chooses by scores, ``score(problem, config) -> Tensor`` (out, in) of the weights as they are; what
    can be compared over all layers (``per: global``).
    ``learn``: of an allocation that works on whole blocks, in the place of ``summarise``: ``learn(problem: BlockProblem, target,
    config) -> dict[str, Solved]``; the next block sees what the block gives with these weights, and each layer's summary is
    the ``notes`` of its solution.
    ``comparison``: where a solver compares scores unless the recipe says: "layer" or "row".
    ``makes``: any of "zeros", "codes" – which constraints a solver accepts beyond the plain one; "forms": the result of
    a grid may be a form of :mod:`.stored` instead of plain codes, which not every file format holds; "factors": the zeros are
    those of a part of a sum; "exchanges": zeros of the step before move one by one; "single": weights are removed one by one.
    ``fold``: of a solver that can also run as a step of its own, without bits: ``fold(problem, config) -> (s, notes)``, one
    factor per input (in,) that goes into the weights while 1/s goes into what makes the input. Of a ``rotation`` that is
    learned: ``fold(turns, stream, values, config) -> (turns, notes)``, from layers with samples of their inputs.
    """

    name: str
    family: str
    kind: str
    summary: str
    source: str
    config: type
    run: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()
    summarise: Callable[..., Any] | None = None
    comparison: str = "layer"
    score: Callable[..., Any] | None = None
    learn: Callable[..., Any] | None = None
    fold: Callable[..., Any] | None = None

    def settings(self) -> Mapping[str, Any]:
        """Setting name → default."""
        return {
            f.name: (f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default)
            for f in dataclasses.fields(self.config)
        }
