"""Blocks stream by: load one, run it forward once in stages, solve each stage's layers, hand the outputs on.

At every stage the inputs that the layers see already include the compression of everything before them,
and each product with a weight matrix is done exactly once, with the compressed weights:

    for stage in block.stages:                 qkv → out → gate/up → down
        for every batch: go on to this stage's input x, add x to the statistics
        solve the stage's layers               one Gram matrix, one factorisation, one stacked sweep
    h ← outputs of the block
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import (
    HOST,
    NM,
    Both,
    Budget,
    Factor,
    Fixed,
    NMByRow,
    NumericalError,
    Pattern,
    Problem,
    Solved,
    Stack,
    Stats,
    Tally,
    histogram_entropy,
    is_finite,
    moved,
    on,
)
from ..kernels.columns import column_loop, entry_loop
from ..models import Block, Linear, Model, Run
from .drift import DenseRuns, made_up
from .gradients import OUTPUT_BLOCKS, OUTPUT_GRAM, OUTPUT_POWER, TOKEN_WEIGHT
from .layers import constraint_for, wanted
from .recipe import Step
from .waiting import Aside, aside

try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError, TypeError):  # not glibc
    _trim = None


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what large tensors leave behind, in pieces that the next block's
    tensors may not fit, so that the resident size would creep up with the number of blocks."""
    if _trim is not None:
        _trim(0)


_LEAST_POWER = 1e-6  # of a row, beside the mean
_SAMPLE = 1 << 18  # inputs of a stage that a calibrator of ranges looks at
Visit = Callable[[tuple[Linear, ...], Stats], None]
Extras = Callable[[int], Mapping[str, Mapping[str, Tensor]]]  # of a block, by number: layer → extra → tensor


def stream_block(
    block: Block,
    hidden: list[Tensor],
    visit: Visit,
    gram: bool = True,
    spill: Aside | None = None,
    watch: int | None = None,
    calibrate: Callable[[Tensor, Tensor], float] | None = None,
    bins: int = 0,
    at_once: bool = False,
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
    dense: DenseRuns | None = None,
) -> list[Tensor]:
    """Outputs of the block for every batch; ``visit`` is called once a stage, and may set weights.

    Where nothing is watched (``watch`` 0), statistics are those of white inputs. Batches come from and go back to where they are; a
    block on another device takes one at a time.

    ``hidden``: (batch, tokens, width) each; the list is emptied as it is used. ``watch``: only the first so many
    batches feed the statistics (the others are held-out text that just goes along). ``calibrate``: a sample of a stage's
    inputs and the largest magnitude of each calibration sample → the static scale, where the block's operators ask for one; from there on,
    statistics and products see the rounded inputs. ``at_once``: all stages' statistics are of the block as it was loaded,
    and taken before any is visited; costs a second forward.
    ``bins``: of the inputs' histograms, whose entropy the statistics then have. ``extras``: of the block's layers, with what tokens
    count in the statistics, where that was gathered. ``dense``: what the watched batches are in the dense model; statistics then have
    ``cross``.
    """
    if at_once:
        gathered: list[tuple[tuple[Linear, ...], Stats]] = []
        look = lambda *stage: gathered.append(stage)  # noqa: E731
        stream_block(block, list(hidden), look, gram, spill, watch, calibrate, bins, extras=extras, dense=dense)
        for stage in gathered:
            visit(*stage)
        for i in range(len(hidden)):
            hidden[i] = block.forward(hidden[i])
        give_back()
        return hidden
    device, homes = block.device, [h.device for h in hidden]
    if spill is None:
        spill = aside(block, hidden)
    runs = []
    for i in range(len(hidden)):
        runs.append(block.start(hidden[i]))
        hidden[i] = hidden[i].new_empty(0)
        if spill:
            spill.put(i, runs[i].state)
    for number, stage in enumerate(block.stages):
        tally = Tally(stage[0].columns, gram, device=device)
        weights, at = token_weights(stage, extras or {}), 0
        waits = calibrate is not None and block.operators is not None and block.operators.waits(number)
        if waits:
            assert calibrate is not None and block.operators is not None
            block.operators.scales[number] = calibrate(*_sample_of(runs, number, watch, spill, device))
        for i, run in enumerate(runs):
            if spill:
                spill.get(i, run.state, device)
            if waits:
                assert block.operators is not None
                run.state["x"] = block.operators.rounded(number, run.state["x"])
            elif number:
                run.advance()
            if watch is None or i < watch:
                x = run.input()
                tokens = x.shape[0] * x.shape[1]
                y = None if dense is None else dense.input(i, number)
                tally.add(x, None if weights is None else weights[at : at + tokens], y)
                at += tokens
                del x, y
            if spill:
                spill.put(i, run.state)
        stats = tally.stats()
        del tally
        if not stats.count:
            stats = Stats.white(stage[0].columns, gram, device)
        elif bins:
            stats = replace(stats, entropy=histogram_entropy(lambda: _inputs(runs[:watch], spill, device), bins))
        with on(device):
            visit(stage, stats)
        del stats
    outputs = []
    for i, (run, home) in enumerate(zip(runs, homes, strict=True)):
        if spill:
            spill.get(i, run.state, device)
        run.advance()
        outputs.append(run.output().to(home))
    give_back()
    return outputs


def token_weights(stage: Sequence[Linear], extras: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
    """What each token counts in the statistics of a stage, (tokens,): the mean over the outputs of all its layers."""
    found = [
        (layer.rows, mine[TOKEN_WEIGHT]) for layer in stage if TOKEN_WEIGHT in (mine := extras.get(layer.name, {}))
    ]
    if not found:
        return None
    return torch.stack([rows * w for rows, w in found]).sum(0) / sum(rows for rows, _ in found)


def _inputs(runs: Sequence[Run], spill: Aside | None, device: torch.device) -> Iterator[Tensor]:
    """The inputs of the stage at which all runs are, (tokens, in) each."""
    for i, run in enumerate(runs):
        if spill:
            spill.get(i, run.state, device)
        yield run.input().flatten(0, -2)
        if spill:
            spill.put(i, run.state)


def histogram_bins(steps: Sequence[Step]) -> int:
    """Bins of the histograms that a step reads; 0 where none does."""
    return max((s.config.bins for s in steps if "entropy" in s.method.needs), default=0)


def _sample_of(
    runs: Sequence[Run], stage: int, watch: int | None, spill: Aside | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Brings all runs to ``stage``; about :data:`_SAMPLE` of its inputs, evenly spaced, and the largest magnitude by sample."""
    tops, parts = [], []
    share = max(1, _SAMPLE // len(runs))
    for i, run in enumerate(runs):
        if spill:
            spill.get(i, run.state, device)
        if stage:
            run.advance()
        if watch is None or i < watch:
            x = run.input()
            tops.append(x.abs().amax((1, 2)))
            flat = x.flatten()
            parts.append(flat[:: -(-len(flat) // share)].clone())
        if spill:
            spill.put(i, run.state)
    return torch.cat(parts), torch.cat(tops)


@dataclass(frozen=True)
class LayerResult:
    """One solved layer, on the host, and the numbers that the manifest keeps. ``pattern``: "dense", "unstructured" or "N:M"."""

    layer: Linear
    solved: Solved
    pattern: str
    relative_error: float
    error: float
    notes: Mapping[str, float] = field(default_factory=dict)


def solve_stage(
    layers: Sequence[Linear],
    weights: Mapping[str, Tensor],
    stats: Stats,
    steps: Sequence[tuple[Step, Budget | None]],
    extras: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[LayerResult]:
    """Run the chain of solver steps on the layers of one stage; layers that no step touches are left out.

    ``extras``: layer name → what :attr:`Problem.extras` should hold of it (:mod:`.gradients`). Layers whose steps and group sizes agree are stacked; all share the stage's factorisation.
    """
    factors: dict[tuple[float, bool], Factor] = {}
    stacks: dict[tuple, list[Linear]] = {}
    for layer in layers:
        key = []
        for step, budget in steps:
            grid = constraint_for(layer, step.constraint, budget).grid
            touched = wanted(layer, step.constraint)
            key.append((touched, touched and grid is not None, touched and grid is not None and grid.group_size))
        stacks.setdefault(tuple(key), []).append(layer)
    out: list[LayerResult] = []
    for key, members in stacks.items():
        chain = [s for s, (touched, *_) in zip(steps, key, strict=True) if touched]
        out += _solve_stack(members, weights, stats, chain, factors, extras or {})
    return out


def _solve_stack(
    layers: list[Linear],
    weights: Mapping[str, Tensor],
    stats: Stats,
    chain: Sequence[tuple[Step, Budget | None]],
    factors: dict[tuple[float, bool], Factor],
    extras: Mapping[str, Mapping[str, Tensor]],
) -> list[LayerResult]:
    W = torch.cat([weights[layer.name] for layer in layers])
    extras = {layer.name: moved(extras.get(layer.name, {}), W.device) for layer in layers}
    names = tuple(layer.name for layer in layers)
    free, loops = Stack(((len(W), Both()),)), (column_loop(W.device), entry_loop())
    problem = Problem(W, stats, free, names, None, factors, stacked_extras(layers, extras), *loops)
    solved = None
    patterns = ["dense"] * len(layers)
    for step, budget in chain:
        parts = [(layer.rows, constraint_for(layer, step.constraint, budget)) for layer in layers]
        if step.constraint.shots > 1:  # zeros of an earlier shot stay
            parts = [(n, replace(p, within=weights[la.name] != 0)) for la, (n, p) in zip(layers, parts, strict=True)]
        exponent = step.constraint.row_fisher
        if exponent and OUTPUT_POWER in extras.get(layers[0].name, {}):
            parts = [
                (n, replace(p, worth=_worth(extras[la.name][OUTPUT_POWER], exponent)))
                for la, (n, p) in zip(layers, parts, strict=True)
            ]
        if solved is not None:
            parts = _inherit(parts, problem, solved, step)
        constraint = Stack(tuple(parts))
        if not constraint.sparse and not constraint.quantized:
            continue
        patterns = [_pattern(part.pattern, old) for (_, part), old in zip(parts, patterns, strict=True)]
        problem = replace(problem, constraint=constraint, start=solved)
        solved = step.method.run(problem, step.config)
        if not is_finite(solved.weight):
            raise NumericalError(f"{step.name} made non-finite weights in {', '.join(names)}; raise its damping")
    if solved is None:
        return []
    energy, results, row = problem.energy(), [], 0
    parts = problem.split(solved)
    for layer, pattern in zip(layers, patterns, strict=True):
        part = parts[layer.name]
        error, scale = float(part.error.sum()), float(energy[row : row + layer.rows].sum())
        results.append(LayerResult(layer, moved(part, HOST), pattern, error / max(scale, 1e-30), error, part.notes))
        row += layer.rows
    return results


def stacked_extras(layers: list[Linear], extras: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Extras of the layers of a stack, stacked by rows (per output rows; Gram matrices block by block)."""
    mine = [extras.get(layer.name, {}) for layer in layers]
    out: dict[str, Tensor] = {}
    for key in mine[0].keys() - {TOKEN_WEIGHT}:
        parts = [m[key] for m in mine]
        if key == OUTPUT_BLOCKS:
            widest = max(p.shape[1] for p in parts)
            parts = [pad(p, (0, widest - p.shape[1])) for p in parts]
        out[key] = torch.block_diag(*parts) if key == OUTPUT_GRAM else torch.cat(parts, dim=-min(2, parts[0].dim()))
    return out


def _worth(power: Tensor, exponent: float) -> Tensor:
    """What the scores of rows count: (E[g²] over its mean)^exponent."""
    return (power / power.mean().clamp_min(1e-30)).clamp_min(_LEAST_POWER) ** exponent


def _pattern(pattern: Pattern | None, before: str) -> str:
    """The pattern of a layer after a step: steps that keep an earlier mask keep its N:M."""
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}"
    if isinstance(pattern, NMByRow):
        return f"n:{pattern.m}"
    if isinstance(pattern, Fixed) and before != "dense":
        return before
    return "dense" if pattern is None else "unstructured"


def _inherit(parts: list[tuple[int, Both]], problem: Problem, solved: Solved, step: Step) -> list[tuple[int, Both]]:
    """A later step keeps the zeros and the grid of the earlier one unless it brings its own."""
    out = []
    for (rows, part), (place, before) in zip(parts, problem.constraint.slices(), strict=True):
        pattern, within = part.pattern, before.within if part.within is None else part.within
        if not step.constraint.prunes and solved.mask is not None:
            pattern = Fixed(solved.mask[place])
        out.append((rows, Both(pattern, part.grid or before.grid, within, part.worth)))
    return out


def solve_blocks(
    model: Model,
    hidden: list[Tensor],
    steps: Sequence[tuple[Step, Budget | None]],
    *,
    extras: Extras | None = None,
    watch: int | None = None,
    at_once: bool = False,
    visit: Callable[[LayerResult], None] | None = None,
    keep: Callable[[int, Block], None] | None = None,
    tick: Callable[[int, int], None] | None = None,
    drift: float = 0.0,
) -> list[Tensor]:
    """All blocks in turn, solved in memory; hidden states after the last. ``watch``, ``at_once``: as of :func:`stream_block`;
    ``drift``: as of the calibration.

    ``visit`` sees every solved layer, ``keep`` every solved block with its number.
    """
    gram, bins = any("gram" in s.method.needs for s, _ in steps), histogram_bins([s for s, _ in steps])
    dense = [h.clone() for h in hidden[:watch]] if drift else []
    for i in range(model.blocks):
        block, mine = model.load_block(i), extras(i) if extras else None
        beside = DenseRuns(block, dense, aside(block, hidden + dense), len(hidden)) if drift else None

        def solve(stage: tuple[Linear, ...], stats: Stats, block: Block = block, mine: Any = mine) -> None:
            weights = made_up({layer.name: block.weight(layer.name) for layer in stage}, stats, drift)
            for result in solve_stage(stage, weights, stats, steps, mine):
                block.set_weight(result.layer.name, result.solved.weight)
                if visit:
                    visit(result)

        hidden = stream_block(
            block, hidden, solve, gram or drift > 0, watch=watch, bins=bins, at_once=at_once, extras=mine, dense=beside
        )
        dense = beside.outputs() if beside else []
        if keep:
            keep(i, block)
        if tick:
            tick(i + 1, model.blocks)
    return hidden
