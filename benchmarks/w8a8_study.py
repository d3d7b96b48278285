"""Where W8A8 loses: KL to the dense model on held-out calibration text with parts of it rounded.

    .venv/bin/python benchmarks/w8a8_study.py [MODEL] [--only PATTERN] [--samples 8] [--windows 6] [--length 512]

In memory, nothing is solved: weights to nearest, factors of SmoothQuant from the largest magnitudes of the calibration samples, or from
their root mean squares.
Stages: 0 is the input of q, k, v; 1 of o; 2 of gate and up; 3 of down.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from study import study_parser
from torch import Tensor

from lissom.core import Grid, Stats
from lissom.export import open_model
from lissom.methods.quantize.smoothquant import smooth_scale, statistic_of
from lissom.models import Block, InputGrid, Linear, Model, Operators
from lissom.models.folds import fold, shared_factor, source_of
from lissom.models.operators import BlockOperators
from lissom.pipeline.curves import mean_kl
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.sections import Calibration
from lissom.pipeline.stream import stream_block

ALL = (0, 1, 2, 3)
ROW = Grid(8, None, True)
Change = Callable[[Block], None]


def rounded(grid: Grid) -> Change:
    def change(block: Block) -> None:
        for la in block.linears:
            block.set_weight(la.name, grid.project(block.weight(la.name)))

    return change


@torch.no_grad()
def main() -> None:
    parser = study_parser(__doc__, 6)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    model = Model(open_model(options.model))
    setting = Calibration(options.calibration, options.samples, options.length)
    data = load_calibration(model.checkpoint.tokenizer(), setting, model.config.vocab_size, options.windows)
    seen: dict[tuple[int, int], Stats] = {}
    hidden = [torch.cat(embed(model, data.ids))]
    for i in range(model.blocks):

        def visit(stage: tuple[Linear, ...], stats: Stats, i: int = i) -> None:
            seen[i, stage[0].stage] = stats

        hidden = stream_block(model.load_block(i), hidden, visit, gram=False)

    def smoothed(alpha: float, stages: tuple[int, ...] = ALL, statistic: str = "absmax") -> Change:
        def change(block: Block) -> None:
            at = model.prefix + block.row.layer.format(block.number)
            for s in stages:
                source = source_of(block.row, model.config, at, block.linears, s)
                if not isinstance(source, str):
                    W = torch.cat([block.weight(la.name) for la in source.readers])
                    factor = smooth_scale(statistic_of(seen[block.number, s], statistic), W, alpha)
                    fold(block, source, shared_factor(source, factor, block.sizes))
            rounded(ROW)(block)

        return change

    inputs = {s: Operators(InputGrid(8, (s,))) for s in ALL}
    every = Operators(InputGrid(8, ALL))
    variants: dict[str, tuple[Change | None, Operators | None]] = {
        "weights by row": (rounded(ROW), None),
        "weights by row, MSE ranges": (rounded(Grid(8, None, True, "mse")), None),
        "weights by groups of 64": (rounded(Grid(8, 64, True)), None),
        "inputs by token": (None, every),
        **{f"inputs by token, stage {s} only": (None, own) for s, own in inputs.items()},
        "both": (rounded(ROW), every),
        **{f"both, smoothed, alpha {a}": (smoothed(a), every) for a in (0.3, 0.5, 0.7, 0.85)},
        **{f"both, smoothed by rms, alpha {a}": (smoothed(a, ALL, "rms"), every) for a in (0.5, 0.6, 0.7)},
        "both, smoothed, alpha 0.5, stage 3 left out": (smoothed(0.5, (0, 1, 2)), every),
    }
    outer = model.load_outer()

    def final(change: Change | None, operators: Operators | None) -> Tensor:
        h = torch.cat(embed(model, data.held_out))
        for i in range(model.blocks):
            block = model.load_block(i)
            block.operators = BlockOperators(operators, i) if operators else None
            if change:
                change(block)
            h = torch.cat([block.forward(x) for x in h.split(4)])
        return h

    dense = final(None, None)
    for name, (change, operators) in variants.items():
        if re.search(options.only, name):
            print(f"| {name} | {mean_kl(model, dense, final(change, operators), outer):.4f} |", flush=True)


if __name__ == "__main__":
    main()
