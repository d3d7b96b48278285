"""Compression time as a multiple of one dense forward over the same calibration tokens, in one process.

    .venv/bin/python benchmarks/speed.py [--recipe sparsegpt] [--samples 32] [--length 512] [--set key=value …]

The dense forward (all blocks and the head's logits) is timed before and after the compression and averaged, so that a drift of
the machine shows. Wall and CPU seconds are both printed: on a shared machine only the second is comparable.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from lissom.evaluate import load_text, samples, tokenize
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import compress

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2" / "valid.txt"


@torch.no_grad()
def dense_forward(model: Model, ids: torch.Tensor) -> None:
    hidden = [model.embed(part) for part in ids.split(8)]
    for i in range(model.blocks):
        block = model.load_block(i)
        hidden = [block.forward(h) for h in hidden]
    for h in hidden:
        for part in h.flatten(0, 1).split(1024):
            model.head(part[None])


def timed(work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--data", default=str(DATA) if DATA.exists() else "builtin")
    options = parser.parse_args()
    checkpoint = open_model("demo")
    model = Model(checkpoint)
    ids = samples(tokenize(checkpoint.tokenizer(), load_text(options.data)), options.samples, options.length, 0)
    work = Path(tempfile.mkdtemp(prefix="lissom-speed-"))
    overrides = [
        *options.set,
        f"calibration.data={options.data}",
        f"calibration.samples={options.samples}",
        f"calibration.length={options.length}",
    ]
    found: dict = {}
    try:
        before = timed(lambda: dense_forward(model, ids))
        total = timed(lambda: found.update(compress("demo", work / "out", options.recipe, overrides=overrides)))
        after = timed(lambda: dense_forward(model, ids))
    finally:
        shutil.rmtree(work)
    forward = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    print(
        json.dumps(
            {
                "recipe": options.recipe,
                "threads": torch.get_num_threads(),
                "tokens": ids.numel(),
                "dense_forward_s": {"wall": [before[0], after[0]], "cpu": [before[1], after[1]]},
                "compress_s": {"wall": total[0], "cpu": total[1]},
                "stages_wall_s": found["stages"],
                "ratio": {"wall": total[0] / forward[0], "cpu": total[1] / forward[1]},
                "ratio_allocate_and_blocks_wall": (found["stages"]["allocate"] + found["stages"]["blocks"])
                / forward[0],
                "peak_rss_bytes": found["peak_rss_bytes"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
