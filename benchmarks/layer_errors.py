"""Layer errors on real inputs: exact greedy removal beside its approximations, and what N of 16 costs beside unstructured zeros.

    .venv/bin/python benchmarks/layer_errors.py [--blocks 2 14] [--table exact|groups|factors]

The demo model, dense inputs, 8 × 512 tokens of WikiText-2 valid, seed 0. Prints tables of Markdown.
`exact`: l-obs, which would take hours on the whole model, on the first 64 rows of `k` (576 inputs); error with SparseGPT = 1, CPU seconds.
`groups`: ALPS at 75%; error with unstructured zeros over the layer = 1. Orders of the inputs are free for `o` within a head and for
`down`; for the others, which read the residual stream, the column shows what an order of their own would give.
`factors`: OATS with its parameters shared between zeros and factors; error with zeros alone (Wanda's, by row) = 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lissom.core import NM, NMByRow, Pattern, Problem, Sparse, Stats
from lissom.export import open_model
from lissom.methods import METHODS
from lissom.methods.prune.oats import OATS, oats
from lissom.methods.prune.permute import assign
from lissom.methods.prune.ria import ria_score
from lissom.models import Linear, Model
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.sections import Calibration
from lissom.pipeline.stream import stream_block

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"
SOLVERS = ("l-obd", "sparsegpt", "l-obs", "alps")
ROLES = {"q": 576, "k": 192, "v": 192, "o": 576, "gate": 768, "down": 288}  # rows that are looked at
HEAD = 64


@torch.no_grad()
def layers(blocks: Sequence[int]) -> dict[tuple[int, str], tuple[Tensor, Stats]]:
    """(block, role) → weights (rows, in) and the statistics of their inputs."""
    model = Model(open_model("demo"))
    settings = Calibration(str(DATA / "valid.txt"), samples=8, length=512)
    hidden = embed(model, load_calibration(model.checkpoint.tokenizer(), settings, model.config.vocab_size).ids)
    found = {}
    for i in range(max(blocks) + 1):
        block = model.load_block(i)

        def visit(stage: tuple[Linear, ...], stats: Stats, i: int = i, block=block) -> None:
            for layer in stage:
                if layer.role in ROLES and i in blocks:
                    found[i, layer.role] = (block.weight(layer.name)[: ROLES[layer.role]].clone(), stats)

        hidden = stream_block(block, hidden, visit, gram=i in blocks)
    return found


def error(solver: str, weight: Tensor, stats: Stats, pattern: Pattern) -> float:
    method = METHODS[solver]
    return float(method.run(Problem.of(weight, stats, pattern), method.config()).error.sum())


def exact(found: dict[tuple[int, str], tuple[Tensor, Stats]]) -> None:
    print(f"| block | pattern | {' | '.join(SOLVERS)} |\n|---|---|{'---|' * len(SOLVERS)}")
    patterns = {"50%": Sparse(0.5, "row"), "70%": Sparse(0.7, "row"), "2:4": NM(2, 4), "4:16": NM(4, 16)}
    for (i, role), (weight, stats) in found.items():
        if role != "k":
            continue
        for name, pattern in patterns.items():
            errors, seconds = {}, {}
            for solver in SOLVERS:
                started = time.process_time()
                errors[solver] = error(solver, weight[:64], stats, pattern)
                seconds[solver] = time.process_time() - started
            cells = [f"{errors[s] / errors['sparsegpt']:.3f} ({seconds[s]:.1f} s)" for s in SOLVERS]
            print(f"| {i} | {name} | {' | '.join(cells)} |", flush=True)


def in_order(stats: Stats, order: Tensor) -> Stats:
    assert stats.gram is not None
    vectors = {key: getattr(stats, key)[order] for key in ("sum", "sumsq", "absmax")}
    return replace(stats, gram=stats.gram[order][:, order], **vectors)


def best_order(role: str, score: Tensor, n: int, m: int) -> Tensor:
    """RIA's assignment; within each head for `o`."""
    if role != "o":
        return assign(score, n, m)
    return torch.cat([assign(part, n, m) + HEAD * i for i, part in enumerate(score.split(HEAD, 1))])


def groups(found: dict[tuple[int, str], tuple[Tensor, Stats]]) -> None:
    columns = ("by row", "4:16", "8:32", "4:16, inputs reordered", "N:16 by row", "the same, inputs apart")
    print(f"| block | layer | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for (i, role), (weight, stats) in found.items():
        base = error("alps", weight, stats, Sparse(0.75))
        tried = [error("alps", weight, stats, p) for p in (Sparse(0.75, "row"), NM(4, 16), NM(8, 32))]
        order = best_order(role, ria_score(weight, stats.norm, 0.5), 4, 16)
        tried.append(error("alps", weight[:, order], in_order(stats, order), NM(4, 16)))
        tried.append(error("alps", weight, stats, NMByRow(0.75, 16)))
        apart = torch.arange(weight.shape[1]).reshape(16, -1).T.flatten()  # groups of inputs that stand in/16 apart
        tried.append(error("alps", weight[:, apart], in_order(stats, apart), NMByRow(0.75, 16)))
        print(f"| {i} | {role} | {' | '.join(f'{e / base:.2f}' for e in tried)} |", flush=True)


def factors(found: dict[tuple[int, str], tuple[Tensor, Stats]]) -> None:
    shares, sparsities = (0.1, 0.25), (0.5, 0.7)
    print(f"| block | layer | {' | '.join(f'{s:.0%}, κ {k}' for s in sparsities for k in shares)} |")
    print("|---|---|---|---|---|---|")
    for (i, role), (weight, stats) in found.items():
        cells = []
        for s in sparsities:
            problem = Problem.of(weight, stats, Sparse(s, "row"))
            zeros = float(oats(problem, OATS(rank_share=0)).error.sum())
            cells += [f"{float(oats(problem, OATS(rank_share=k)).error.sum()) / zeros:.2f}" for k in shares]
        print(f"| {i} | {role} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14])
    parser.add_argument("--table", choices=("exact", "groups", "factors"))
    options = parser.parse_args()
    found = layers(options.blocks)
    for table in (exact, groups, factors):
        if options.table in (None, table.__name__):
            table(found)


if __name__ == "__main__":
    main()
