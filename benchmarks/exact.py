"""Exact greedy removal (l-obs) beside the solvers that approximate it, on rows of real layers; the whole model would take hours.

    .venv/bin/python benchmarks/exact.py [--blocks 2 14 27] [--rows 64]

Layer error relative to the output's energy, SparseGPT = 1: the first rows of `k` (576 inputs) in the dense demo model, 8 × 512 tokens
of WikiText-2 valid, seed 0. Prints a table of Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lissom.core import NM, Problem, Sparse, Stats
from lissom.export import open_model
from lissom.methods import METHODS
from lissom.models import Linear, Model
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.recipe import Calibration
from lissom.pipeline.stream import stream_block

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"
PATTERNS = {"50%": Sparse(0.5, "row"), "70%": Sparse(0.7, "row"), "2:4": NM(2, 4), "4:16": NM(4, 16)}
SOLVERS = ("l-obd", "sparsegpt", "l-obs", "alps")


@torch.no_grad()
def layers(blocks: list[int], rows: int) -> dict[int, tuple[torch.Tensor, Stats]]:
    """Block → weights (rows, in) of `k` and the statistics of its inputs."""
    model = Model(open_model("demo"))
    settings = Calibration(str(DATA / "valid.txt"), samples=8, length=512)
    hidden = embed(model, load_calibration(model.checkpoint.tokenizer(), settings, model.config.vocab_size).ids)
    found = {}
    for i in range(max(blocks) + 1):
        block = model.load_block(i)

        def visit(stage: tuple[Linear, ...], stats: Stats, i: int = i, block=block) -> None:
            for layer in stage:
                if layer.role == "k" and i in blocks:
                    found[i] = (block.weight(layer.name)[:rows].clone(), stats)

        hidden = stream_block(block, hidden, visit, gram=i in blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 27])
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    print(f"| block | pattern | {' | '.join(SOLVERS)} |\n|---|---|{'---|' * len(SOLVERS)}")
    for i, (weight, stats) in layers(options.blocks, options.rows).items():
        for name, pattern in PATTERNS.items():
            problem = Problem.of(weight, stats, pattern)
            errors, seconds = {}, {}
            for solver in SOLVERS:
                started = time.process_time()
                errors[solver] = float(METHODS[solver].run(problem, METHODS[solver].config()).error.sum())
                seconds[solver] = time.process_time() - started
            cells = [f"{errors[s] / errors['sparsegpt']:.3f} ({seconds[s]:.1f} s)" for s in SOLVERS]
            print(f"| {i} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
