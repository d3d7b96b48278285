"""What a rounded cache costs over long context: perplexity of windows with nothing rounded but keys and values.

    .venv/bin/python benchmarks/kv_cache.py [MODEL] [--length 2048] [--windows 4]

All variants stream through the blocks together, in memory; static grids are calibrated on 16 × 512 tokens. Keys and values are what
decoding token by token would read (docs/methods/kv-cache.md). Rows go to benchmarks/rows/kv-cache.json.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch
from study import into_results

from lissom.evaluate import load_text, token_losses, tokenize, windows
from lissom.export import open_model
from lissom.methods.quantize.kv_cache import KVCache
from lissom.models import Model, Operators
from lissom.models.operators import BlockOperators
from lissom.pipeline.data import load_calibration
from lissom.pipeline.operating import cache_grids
from lissom.pipeline.sections import Calibration

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "wikitext2"


def variants() -> dict[str, KVCache]:
    """Name → settings: bits × keys by channel or token × dynamic or static; values by token."""
    out = {}
    for static, keys, bits in product((False, True), ("channel", "token"), (8, 4, 2)):
        out[f"{bits} bits, keys by {keys}, {'static' if static else 'dynamic'}"] = KVCache(
            bits, keys=keys, static=static
        )
    return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--calibration", default=str(DATA / "valid.txt"))
    parser.add_argument("--test", default=str(DATA / "test.raw.txt"))
    parser.add_argument("--rows", type=Path, default=HERE / "rows" / "kv-cache.json")
    options = parser.parse_args()
    model, start = Model(open_model(options.model)), time.perf_counter()
    tokenizer = model.checkpoint.tokenizer()
    ids = load_calibration(tokenizer, Calibration(options.calibration, 16, 512), model.config.vocab_size).ids
    test = windows(tokenize(tokenizer, load_text(options.test)), options.windows, options.length)
    operators: dict[str, Operators | None] = {"dense": None}
    for name, config in variants().items():
        operators[name] = Operators(cache=config.grids())
        if config.static:
            model.operators = operators[name]
            operators[name] = Operators(cache=config.grids(), cache_grids=cache_grids(model, 100.0, ids))
    print(f"static grids after {time.perf_counter() - start:.0f} s", flush=True)
    model.operators = Operators()
    streams = {name: model.embed(test) for name in operators}
    for i in range(model.blocks):
        block = model.load_block(i)
        for name, own in operators.items():
            block.operators = BlockOperators(own, i) if own else None
            streams[name] = torch.cat([block.forward(h[None]) for h in streams[name]])
        print(f"block {i + 1}/{model.blocks}, {time.perf_counter() - start:.0f} s", flush=True)
    found = {}
    for name, h in streams.items():
        losses = [token_losses(model, x[None], row).flatten() for x, row in zip(h, test, strict=True)]
        found[name] = float(torch.cat(losses).mean().exp())
    options.rows.write_text(json.dumps(found, indent=1))
    lines = ["| cache | perplexity | |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {value / found['dense'] - 1:+.1%} |" for name, value in found.items()]
    into_results("kv-cache", lines)


if __name__ == "__main__":
    main()
