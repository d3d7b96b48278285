"""Every quantizer of weights on one model: perplexity, bits a weight and seconds, at 3 bits and groups of 128 or the form's own.

    .venv/bin/python benchmarks/quantizers.py [MODEL] [--only PATTERN] [--samples 8] [--windows 4] [--length 512] [--render]

Every method compresses a model of its own in memory, each layer on the inputs that the compressed layers before it give; embedding
and head stay dense. Bits count the stored form. Seconds are of this process, in the solver only. Rows go to
benchmarks/rows/quantizers.json; methods that are there are not run again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from study import DATA, HERE, calibrated, into_results, judged, study_parser

from lissom.core import Problem, Solved, stored_bits
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import read
from lissom.pipeline.data import CalibrationSet
from lissom.pipeline.gradients import for_recipe
from lissom.pipeline.recipe import Recipe
from lissom.pipeline.stream import LayerResult

G3 = {"bits": 3, "group_size": 128}
STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"use": "rtn", **G3},
    "rtn, MSE ranges": {"use": "rtn", **G3, "range": "mse"},
    "hqq": {"use": "hqq", **G3},
    "gptq": {"use": "gptq", **G3},
    "gptq, act order, MSE ranges": {"use": "gptq", **G3, "act_order": True, "range": "mse"},
    "gptq-descent": {"use": "gptq-descent", **G3},
    "yaqa, MSE ranges": {"use": "yaqa", **G3, "range": "mse"},
    "awq": {"use": "awq", **G3},
    "autoround, 60 iterations": {"use": "autoround", **G3, "iterations": 60},
    "omniquant, 30 steps": {"use": "omniquant", **G3, "steps": 30},
    "spqr": {"use": "spqr", "bits": 3, "group_size": 16},
    "quip": {"use": "quip", "bits": 3},
    "bcq": {"use": "bcq", **G3},
    "gobo": {"use": "gobo", "bits": 3},
    "codebook k-means by row": {"use": "codebook", "bits": 3, "group_size": 0, "table": "kmeans"},
    "codebook NF4, groups of 64": {"use": "codebook", "bits": 4, "group_size": 64, "table": "nf"},
    "codebook MXFP4": {"use": "codebook", "bits": 4, "group_size": 32, "table": "mxfp4"},
    "codebook NVFP4": {"use": "codebook", "bits": 4, "group_size": 16, "table": "nvfp4"},
    "vs-quant, vectors of 16": {"use": "vs-quant", "bits": 3, "group_size": 16},
    "loftq, rank 16": {"use": "loftq", **G3, "weighted": True},
    "llm-int8": {"use": "llm-int8", "bits": 8, "group_size": 0, "symmetric": True},
    "smoothquant, 8 bits by row": {"use": "smoothquant", "bits": 8, "group_size": 0, "symmetric": True},
}


def main() -> None:
    parser = study_parser(__doc__, 4)
    parser.add_argument("--test", default=str(DATA / "test.raw.txt"))
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", type=Path, default=HERE / "rows" / "quantizers.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    names = ("dense", *STEPS)
    wanted = [n for n in names if n not in rows and re.search(options.only, n) and not options.render]
    if wanted:
        model = Model(open_model(options.model))
        data = calibrated(model, options)
        for name in wanted:
            rows[name] = measure(model, read([STEPS[name]]) if name in STEPS else None, data)
            options.rows.write_text(json.dumps(rows, indent=1))
            print(name, rows[name], flush=True)
    lines = ["| method | perplexity | bits a weight | seconds |", "|---|---|---|---|"]
    for name in names:
        if name in rows:
            r = rows[name]
            lines.append(f"| {name} | {r['perplexity']:.2f} | {r['bits']:.2f} | {r['seconds']:.0f} |")
    into_results("quantizers", lines)


def measure(model: Model, recipe: Recipe | None, data: CalibrationSet) -> dict[str, Any]:
    if recipe is None:
        return {"perplexity": judged(model, None, data), "bits": 16.0, "seconds": 0.0}
    step = recipe.steps[0]
    seconds, bits, weights, run = 0.0, 0.0, 0, step.method.run

    def timed(problem: Problem, config: Any) -> Solved:
        nonlocal seconds
        clock = time.process_time()
        solved = run(problem, config)
        seconds += time.process_time() - clock
        return solved

    def weigh(result: LayerResult) -> None:
        nonlocal bits, weights
        form = result.solved.codes if result.solved.codes is not None else result.solved.stored
        assert form is not None
        bits += stored_bits(form)
        weights += result.solved.weight.numel()

    step = dataclasses.replace(step, method=dataclasses.replace(step.method, run=timed))
    with tempfile.TemporaryDirectory(prefix="lissom-quantizers-") as folder:
        clock = time.process_time()
        extras = for_recipe(model, data.ids, Path(folder), recipe)
        seconds = time.process_time() - clock
        perplexity = judged(model, step, data, visit=weigh, extras=extras)
    return {"perplexity": perplexity, "bits": bits / weights, "seconds": seconds}


if __name__ == "__main__":
    main()
