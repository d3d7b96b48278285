"""Every quantizer of weights on one model: perplexity, bits a weight and seconds, at 3 bits and groups of 128 or the form's own.

    .venv/bin/python benchmarks/quantizers.py [MODEL] [--only PATTERN] [--samples 8] [--windows 4] [--length 512] [--render]

A reduced protocol: every method solves every layer from the *dense* model's inputs, in one pass over the blocks; evaluation
windows stream along through each result, in memory; embedding and head stay dense. Bits count the stored form. Seconds are of this
process, in the solver only. Rows go to benchmarks/rows/quantizers.json; methods that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from study import DATA, into_results, study_parser

from lissom.core import Problem, Stack, Stats, stored_bits
from lissom.evaluate import load_text, token_losses, tokenize, windows
from lissom.export import open_model
from lissom.models import Linear, Model
from lissom.pipeline import read
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.layers import constraint_for
from lissom.pipeline.recipe import Calibration
from lissom.pipeline.stream import stream_block

HERE = Path(__file__).parent
G3 = {"bits": 3, "group_size": 128}
STEPS: dict[str, dict[str, Any]] = {
    "rtn": {"use": "rtn", **G3},
    "rtn, MSE ranges": {"use": "rtn", **G3, "range": "mse"},
    "hqq": {"use": "hqq", **G3},
    "gptq": {"use": "gptq", **G3},
    "gptq, act order, MSE ranges": {"use": "gptq", **G3, "act_order": True, "range": "mse"},
    "gptq-descent": {"use": "gptq-descent", **G3},
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


@torch.no_grad()
def main() -> None:
    parser = study_parser(__doc__, 4)
    parser.add_argument("--only", default="")
    parser.add_argument("--test", default=str(DATA / "test.raw.txt"))
    parser.add_argument("--rows", type=Path, default=HERE / "rows" / "quantizers.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    wanted = [n for n in STEPS if n not in rows and re.search(options.only, n) and not options.render]
    if wanted:
        rows |= run(options, wanted, with_dense="dense" not in rows)
        options.rows.write_text(json.dumps(rows, indent=1))
    lines = ["| method | perplexity | bits a weight | seconds |", "|---|---|---|---|"]
    for name in ("dense", *STEPS):
        if name in rows:
            r = rows[name]
            lines.append(f"| {name} | {r['perplexity']:.2f} | {r['bits']:.2f} | {r['seconds']:.0f} |")
    into_results("quantizers", lines)


def run(options: argparse.Namespace, wanted: list[str], with_dense: bool) -> dict[str, Any]:
    model, start = Model(open_model(options.model)), time.perf_counter()
    tokenizer = model.checkpoint.tokenizer()
    setting = Calibration(options.calibration, options.samples, options.length)
    ids = load_calibration(tokenizer, setting, model.config.vocab_size).ids
    test = windows(tokenize(tokenizer, load_text(options.test)), options.windows, options.length)
    steps = {name: read([STEPS[name]]).steps[0] for name in wanted}
    hidden = embed(model, ids)
    streams = {name: torch.cat(embed(model, test)) for name in (*wanted, *(["dense"] if with_dense else []))}
    bits, seconds, total = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0), 0
    for i in range(model.blocks):
        block, weights = model.load_block(i), {}
        original = {la.name: block.weight(la.name) for la in block.linears}
        total += sum(w.numel() for w in original.values())

        def visit(stage: tuple[Linear, ...], stats: Stats, original: Any = original, weights: Any = weights) -> None:
            factors: dict[Any, Any] = {}
            for la in stage:
                for name, step in steps.items():
                    clock = time.process_time()
                    stack = Stack(((la.rows, constraint_for(la, step.constraint, None)),))
                    problem = Problem(original[la.name], stats, stack, (la.name,), None, factors)
                    solved = step.method.run(problem, step.config)
                    seconds[name] += time.process_time() - clock
                    form = solved.codes if solved.codes is not None else solved.stored
                    assert form is not None
                    bits[name] += stored_bits(form)
                    weights[name, la.name] = solved.weight

        hidden = stream_block(block, hidden, visit)
        for name in streams:
            for la in block.linears:
                block.set_weight(la.name, weights.get((name, la.name), original[la.name]))
            streams[name] = torch.cat([block.forward(h) for h in streams[name].split(4)])
        print(f"block {i + 1}/{model.blocks}, {time.perf_counter() - start:.0f} s", flush=True)
    out = {}
    for name, h in streams.items():
        losses = torch.cat([token_losses(model, x[None], row).flatten() for x, row in zip(h, test, strict=True)])
        out[name] = {
            "perplexity": float(losses.mean().exp()), "bits": bits.get(name, 16.0 * total) / total, "seconds": seconds.get(name, 0.0),
        }  # fmt: skip
    return out


if __name__ == "__main__":
    main()
