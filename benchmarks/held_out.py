"""Recipes compared on held-out calibration text, in memory: what choices are made by before an artefact is measured.

    .venv/bin/python benchmarks/held_out.py [--only PATTERN] [--list]

Calibration: SAMPLES × 512 tokens of the first four fifths of WikiText-2 valid; perplexity of 8 windows of 512 tokens of the last
fifth. Rows are kept in benchmarks/rows/held-out.jsonl and not run again; delete a line to repeat it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import read
from lissom.pipeline.allocate import budgets_for
from lissom.pipeline.data import load_calibration
from lissom.pipeline.planning import make_plan
from lissom.pipeline.structured import smaller_model
from lissom.pipeline.trials import trial_loss

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "wikitext2"
KEPT = HERE / "rows" / "held-out.jsonl"

CLUSTERS = {"use": "loss-clusters"}


def alps(**settings: Any) -> dict[str, Any]:
    return {"use": "alps", **settings}


def gap(n: int) -> dict[str, list[dict[str, Any]]]:
    """N of 16 beside unstructured at equal sparsity, without and with an allocation."""
    sparsity = 1 - n / 16
    free = {"sparsity": sparsity, "pattern": "n:16"}
    wide = {"sparsity": sparsity, "pattern": "n:32"}
    order = {"use": "channel-permutation"}
    return {
        f"{n}:16 unstructured": [alps(sparsity=sparsity)],
        f"{n}:16": [alps(pattern=f"{n}:16")],
        f"{n}:16 permuted": [order, alps(pattern=f"{n}:16")],
        f"{2 * n}:32": [alps(pattern=f"{2 * n}:32")],
        f"{n}:16 clusters unstructured": [CLUSTERS, alps(sparsity=sparsity)],
        f"{n}:16 clusters": [CLUSTERS, alps(**free)],
        f"{n}:16 clusters permuted": [order, CLUSTERS, alps(**free)],
        f"{n}:16 clusters of 32": [CLUSTERS, alps(**wide)],
        f"{n}:16 clusters of 32 permuted": [order, CLUSTERS, alps(**wide)],
    }


PRUNED = {"use": "sparsegpt", "sparsity": 0.7}
ROWS: dict[str, list[dict[str, Any]]] = {
    **gap(4),
    **gap(6),
    "70% clusters, alps": [CLUSTERS, alps(sparsity=0.7)],
    "70% clusters, alps, dsnot, refit": [CLUSTERS, alps(sparsity=0.7), {"use": "dsnot"}, {"use": "refit"}],
    "70% clusters, sparsegpt": [CLUSTERS, PRUNED],
    "70% clusters, sparsegpt, refit": [CLUSTERS, PRUNED, {"use": "refit"}],
    "70% clusters, sparsegpt, dsnot, refit": [CLUSTERS, PRUNED, {"use": "dsnot"}, {"use": "refit"}],
}


def measure(source: str, steps: list[dict[str, Any]], samples: int, length: int, windows: int) -> dict[str, Any]:
    checkpoint = open_model(source)
    model = Model(checkpoint)
    overrides = [f"samples={samples}", f"length={length}", f"allocation_samples={samples}"]
    recipe = read({"steps": steps, "calibration": {"data": str(DATA / "valid.txt")}}, overrides)
    data = load_calibration(checkpoint.tokenizer(), recipe.calibration, model.config.vocab_size, windows)
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="lissom-held-out-") as folder, torch.no_grad():
        model, _ = smaller_model(model, recipe, data, Path(folder), torch.float32)
        plan = make_plan(model, recipe)
        budgets, _ = budgets_for(model, plan, data)
        loss = trial_loss(model, plan, budgets, data)
    return {"perplexity": math.exp(loss), "cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    protocol = f"{options.samples} x {options.length}, {options.windows} windows"
    found = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    done = {(row["name"], row["protocol"]): row for row in found}
    for name, steps in ROWS.items():
        if not re.search(options.only, name):
            continue
        row = done.get((name, protocol))
        if options.list:
            print(f"{name:40} {row['perplexity'] if row else math.nan:8.2f}")
            continue
        if row is None:
            row = {"name": name, "protocol": protocol, "steps": steps}
            row |= measure(options.model, steps, options.samples, options.length, options.windows)
            if options.model == "demo":
                with KEPT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        print(f"{name:40} {row['perplexity']:8.2f} {row['cpu_seconds']:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
