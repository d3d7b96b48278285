"""Which allocation works: SparseGPT under different budgets, judged in memory on windows that stream along.

.venv/bin/python benchmarks/allocation_study.py [MODEL] [--only PATTERN] [--data FILE] [--test FILE|held-out …] [--windows 6] [--length 1024]
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lissom.core import Budget, LayerSummary
from lissom.evaluate import load_text, tokenize, windows
from lissom.export import open_model
from lissom.methods.allocate.atp import ATP, atp
from lissom.methods.allocate.budget import meet
from lissom.methods.allocate.loss_clusters import LossClusters, kmeans_1d, loss_clusters
from lissom.models import Model
from lissom.pipeline import read
from lissom.pipeline.allocate import summarise
from lissom.pipeline.data import load_calibration
from lissom.pipeline.planning import make_plan
from lissom.pipeline.trials import trial_loss

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"
S = 0.7
Layers = Sequence[LayerSummary]


def custom(wanted: Callable[[Layers], list[float]]) -> Callable[[Layers, Layers], Budget]:
    def make(relative: Layers, raw: Layers) -> Budget:
        values = meet(wanted(relative), [layer.size for layer in relative], S, max(0.0, S - 0.35), min(0.95, S + 0.22))
        return Budget("sparsity", {layer.name: v for layer, v in zip(relative, values, strict=True)})

    return make


def steps(layers: Layers) -> list[float]:
    """0 … 1 by group of relative loss, in equal steps."""
    labels = kmeans_1d([float(np.log10(layer.values["loss"])) for layer in layers], 5)
    return [label / 4 for label in labels]


def depth(layers: Layers) -> list[float]:
    last = max(layer.block for layer in layers)
    return [layer.block / last for layer in layers]


def shares(layers: Layers) -> list[float]:
    """Decades of the block's share of the stream above 0.07, which most blocks have."""
    return [math.log10(layer.values["share"] / 0.07) for layer in layers]


def rooted(width: float, per_decade: float) -> Callable[[Layers, Layers], Budget]:
    return custom(
        lambda layers: [width * d**0.5 - per_decade * s for d, s in zip(depth(layers), shares(layers), strict=True)]
    )


ROWS: dict[str, Callable[[Layers, Layers], Budget]] = {
    "uniform": lambda relative, raw: atp(relative, S, ATP(spread=0.0)),
    "clusters of relative loss": lambda relative, raw: loss_clusters(
        relative, S, LossClusters(normalize="output-energy", clusters=5, spread=0.1, below=0.25, above=0.15)
    ),
    "clusters of relative loss x share": lambda relative, raw: loss_clusters(relative, S, LossClusters()),
    "equal steps 0.15": custom(lambda layers: [-0.15 * s for s in steps(layers)]),
    "depth 0.1": custom(lambda layers: [0.1 * d for d in depth(layers)]),
    "depth 0.2": custom(lambda layers: [0.2 * d for d in depth(layers)]),
    "depth 0.3": custom(lambda layers: [0.3 * d for d in depth(layers)]),
    "root of depth 0.25": custom(lambda layers: [0.25 * d**0.5 for d in depth(layers)]),
    "root of depth 0.25, share 0.05": rooted(0.25, 0.05),
    "root of depth 0.25, share 0.10": rooted(0.25, 0.10),
    "root of depth 0.30, share 0.08": rooted(0.30, 0.08),
    "depth -0.1": custom(lambda layers: [-0.1 * d for d in depth(layers)]),
    "depth 0.22, q k -0.1": custom(
        lambda layers: [0.22 * d - 0.1 * (la.role in ("q", "k")) for d, la in zip(depth(layers), layers, strict=True)]
    ),
    "depth 0.25, reversed groups 0.08": custom(
        lambda layers: [0.25 * d + 0.08 * s for d, s in zip(depth(layers), steps(layers), strict=True)]
    ),
    "raw clusters, propagation 4": lambda relative, raw: loss_clusters(
        raw, S, LossClusters(normalize="none", clusters=6, spread=0.25, propagation=4, below=0.3, above=0.2)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--data", default=str(DATA / "valid.txt"))
    parser.add_argument("--test", nargs="+", default=[str(DATA / "test.raw.txt"), str(DATA / "test.txt")])
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=S)
    options = parser.parse_args()
    globals()["S"] = options.sparsity
    checkpoint = open_model(options.model)
    model, tokenizer = Model(checkpoint), checkpoint.tokenizer()
    length = min(512, options.length)
    calibration = [f"calibration.data={options.data}", f"samples={options.samples}", f"length={length}"]
    recipe = read("loss-clusters", [*calibration, f"sparsity={S}", f"allocation_samples={options.samples}"])
    plan = make_plan(model, recipe)
    data = load_calibration(
        tokenizer, recipe.calibration, model.config.vocab_size, 1 if "held-out" in options.test else 0
    )
    allocation, solver = recipe.steps
    few = data.ids[: max(1, options.samples // 4)]
    raw_step = replace(allocation, config=replace(allocation.config, normalize="none"))
    relative, raw = (summarise(model, solver, step, S, few) for step in (allocation, raw_step))
    for name, make in ROWS.items():
        if not re.search(options.only, name):
            continue
        for test in options.test:
            text = tokenize(tokenizer, load_text(options.data if test == "held-out" else test))
            if test == "held-out":  # the last fifth of the calibration text, which no sample touches
                text = text[len(text) * 4 // 5 :]
            held_out = windows(text, options.windows, options.length)
            loss = trial_loss(model, plan, {1: make(relative, raw)}, replace(data, held_out=held_out))
            print(f"{name:34} {Path(test).name:14} {math.exp(loss):8.2f}", flush=True)


if __name__ == "__main__":
    main()
