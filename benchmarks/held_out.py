"""Recipes compared on held-out calibration text, in memory: what choices are made by before an artefact is measured.

    .venv/bin/python benchmarks/held_out.py [--only PATTERN] [--share 1/4] [--list] [--render]

Calibration: 8 × 512 tokens of the first four fifths of WikiText-2 valid, or what the row's name says; perplexity of 8 windows of
512 tokens of the last fifth. "Own text" is sampled from the model at temperature 1, each text from a random token (LLM-QAT,
arXiv 2305.17888, without its greedy start). Rows are kept in benchmarks/rows/held-out.jsonl and not run again; delete a line
to repeat it. `--share 1/4`: the first of every four, for four calls at once. `--render` writes the tables into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from study import into_results, on_host, shared
from torch import Tensor

from lissom.core import device_named
from lissom.evaluate import load_text, samples, tokenize
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import read
from lissom.pipeline.allocate import budgets_for
from lissom.pipeline.data import load_calibration
from lissom.pipeline.gradients import for_recipe
from lissom.pipeline.planning import make_plan
from lissom.pipeline.shots import earlier_shots
from lissom.pipeline.structured import smaller_model
from lissom.pipeline.trials import trial_loss
from lissom.run import generate, open_runner

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
DATA = SHARED / "wikitext2"
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


def shipped(name: str) -> list[dict[str, Any]]:
    return read(name).describe()["steps"]


def swept(**settings: Any) -> list[dict[str, Any]]:
    """Zeros as in recipe `aggressive`, rounding in the sweep with which ALPS ends."""
    return [CLUSTERS, alps(sparsity=0.7, row_fisher=0.5, bits=4, group_size=128, **settings)]


def polished(group: int, method: str = "gptq-descent", **settings: Any) -> list[dict[str, Any]]:
    """The same zeros, then rounding by another method."""
    codes = {"use": method, "bits": 4, "group_size": group, **settings}
    return [CLUSTERS, alps(sparsity=0.7, row_fisher=0.5), codes]


def rows_of_16(**settings: Any) -> list[dict[str, Any]]:
    return [CLUSTERS, alps(sparsity=0.75, pattern="n:16 by row", **settings)]


PRUNED = {"use": "sparsegpt", "sparsity": 0.7}
BEST = [CLUSTERS, alps(sparsity=0.7)]
REPAIR, REFIT = {"use": "dsnot"}, {"use": "refit"}
ROWS: dict[str, list[dict[str, Any]]] = {
    **gap(4),
    **gap(6),
    "70% sparsegpt": [PRUNED],
    "70% sparsegpt, refit": [PRUNED, REFIT],
    "70% sparsegpt in two passes": [PRUNED | {"shots": 2}],
    "70% clusters, sparsegpt": [CLUSTERS, PRUNED],
    "70% clusters, sparsegpt, refit": [CLUSTERS, PRUNED, REFIT],
    "70% clusters, sparsegpt, dsnot, refit": [CLUSTERS, PRUNED, REPAIR, REFIT],
    "70% clusters, sparsegpt in two passes": [CLUSTERS, PRUNED | {"shots": 2}],
    "70% alps": [alps(sparsity=0.7)],
    "70% clusters, alps": BEST,
    "70% clusters, alps, dsnot, refit": [*BEST, REPAIR, REFIT],
    **{f"70% sparsegpt, rows by Fisher^{e}": [PRUNED | {"row_fisher": e}] for e in (0.5, 1)},
    **{f"70% alps, rows by Fisher^{e}": [alps(sparsity=0.7, row_fisher=e)] for e in (0.5, 1)},
    **{f"70% clusters, alps, rows by Fisher^{e}": [CLUSTERS, alps(sparsity=0.7, row_fisher=e)] for e in (0.5, 1)},
    "70% clusters, alps in two passes": [CLUSTERS, alps(sparsity=0.7, shots=2)],
}
# name → steps and the exponent of the tokens' weights
TWO_BITS = [{"use": "gptq-descent", "bits": 2, "group_size": 32}]
FISHER = [PRUNED | {"row_fisher": 0.5}]
GRIDS = {
    "3 bits in groups of 128": {"bits": 3, "group_size": 128, "range": "mse"},
    "4 bits in symmetric groups of 64": {"bits": 4, "group_size": 64, "symmetric": True},
}
THREE, FOUR = GRIDS


def ordered(grid: str) -> list[dict[str, Any]]:
    return [{"use": "gptq", "act_order": True, **GRIDS[grid]}]


def for_the_loss(grid: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"use": "yaqa", **GRIDS[grid], **settings}]


TOKENS: dict[str, tuple[list[dict[str, Any]], float]] = {
    **{f"70% sparsegpt, rows by Fisher^0.5, tokens^{e}": (FISHER, e) for e in (0.25, 0.5, 1)},
    "70% clusters, alps, rows by Fisher^0.5, tokens^0.5": ([CLUSTERS, alps(sparsity=0.7, row_fisher=0.5)], 0.5),
    "4:16, tokens^0.5": ([alps(pattern="4:16")], 0.5),
    **{f"gptq, 3 bits, tokens^{e}": ([{"use": "gptq", "bits": 3}], e) for e in (0, 0.5)},
    **{f"gptq-descent, 2 bits in groups of 32, tokens^{e}": (TWO_BITS, e) for e in (0, 0.5)},
    **{f"gptq in order, {THREE}, tokens^{e}": (ordered(THREE), e) for e in (0, 0.25, 0.5)},
    **{f"bits by layer, gptq in order, {THREE}, tokens^{e}": ([{"use": "bits"}, *ordered(THREE)], e) for e in (0, 0.5)},
    **{f"gptq in order, {FOUR}, tokens^{e}": (ordered(FOUR), e) for e in (0, 0.5)},
    **{f"yaqa, {grid}, tokens^{e}": (for_the_loss(grid), e) for grid in GRIDS for e in (0, 0.5, 0.75)},
    **{f"yaqa with damping_out {d}, {THREE}, tokens^0.5": (for_the_loss(THREE, damping_out=d), 0.5) for d in (0.1, 10)},
    f"yaqa in one sweep, {THREE}, tokens^0.5": (for_the_loss(THREE, sweeps=1), 0.5),
    f"yaqa, {FOUR}, MSE ranges, tokens^0.5": (for_the_loss(FOUR, range="mse"), 0.5),
    "INT4 in ALPS's last sweep, tokens^0": (swept(), 0),
    "INT4 in ALPS's last sweep, ranges by MSE, tokens^0": (swept(range="mse"), 0),
    "INT4 by descent, tokens^0": (polished(128), 0),
    "INT4 by descent in groups of 64, tokens^0": (polished(64), 0),
    "INT4 by YAQA, tokens^0": (polished(128, "yaqa", range="mse"), 0),
    "INT4 by descent, 2 passes from full ranges, tokens^0": (shipped("aggressive"), 0),
}
# the same and a share of what the inputs have lost that is made up for
RECORD = [CLUSTERS, alps(sparsity=0.7, row_fisher=0.5)]
DRIFT: dict[str, tuple[list[dict[str, Any]], float, float]] = {
    **{f"yaqa, {grid}, tokens^0.5, drift {d}": (for_the_loss(grid), 0.5, d) for grid in GRIDS for d in (0.25, 0.5, 1)},
    **{f"70% sparsegpt, drift {d}": ([PRUNED], 0, d) for d in (0.25, 0.5, 1)},
    **{f"70% clusters, alps, rows by Fisher^0.5, drift {d}": (RECORD, 0, d) for d in (0.25, 0.5)},
}
# the same on the record's 32 × 512 tokens
MORE: dict[str, tuple[list[dict[str, Any]], float]] = {
    **{f"32 x 512, 70% clusters, alps, rows by Fisher^0.5, drift {d}": (RECORD, d) for d in (0, 0.25, 0.5, 0.75)},
    **{
        f"32 x 512, 75% N:16 by layer, drift {d}": (
            [{"use": "channel-permutation"}, CLUSTERS, alps(sparsity=0.75, pattern="n:16")],
            d,
        )
        for d in (0, 0.25, 0.5, 0.75)
    },
    "32 x 512, 75% N:16 by row, drift 0.25": (rows_of_16(), 0.25),
    "32 x 512, 75% N:16 by row, permuted, drift 0.25": ([{"use": "channel-permutation"}, *rows_of_16()], 0.25),
    "32 x 512, 75% N:16 by row, rows by Fisher^0.5, drift 0.25": (rows_of_16(row_fisher=0.5), 0.25),
    **{f"32 x 512, recipe aggressive with INT4, drift {d}": (shipped("aggressive"), d) for d in (0, 0.25, 0.5)},
}
# name → samples, their length, and the texts that take turns; all with BEST
TEXTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "32 x 128": (32, 128, ("valid",)),
    "2 x 2048": (2, 2048, ("valid",)),
    "32 x 512": (32, 512, ("valid",)),
    "128 x 512": (128, 512, ("valid",)),
    "8 x 512 of Brown": (8, 512, ("brown",)),
    "8 x 512 of the model's own text": (8, 512, ("own",)),
    "32 x 512 of the model's own text": (32, 512, ("own",)),
    "8 x 512, half own text": (8, 512, ("valid", "own")),
    "32 x 512, a third each of WikiText, Brown, news": (32, 512, ("valid", "brown", "abc")),
    "32 x 512, half own text": (32, 512, ("valid", "own")),
}


def own_text(source: str, vocabulary: int, tokens: int) -> Tensor:
    """At least ``tokens`` ids in texts of up to 512, sampled from the model."""
    runner = open_runner(source)
    firsts = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    texts: list[list[int]] = []
    while sum(map(len, texts)) < tokens:
        n = len(texts)
        made = generate(runner, [firsts[n]], max_tokens=511, temperature=1.0, seed=n)
        texts.append([firsts[n], *made.tokens])
    return torch.tensor([i for text in texts for i in text])


def pool(source: str, name: str, tokenizer: Any, vocabulary: int, tokens: int) -> Tensor:
    if name == "own":
        return own_text(source, vocabulary, 2 * tokens)
    if name == "valid":
        ids = tokenize(tokenizer, load_text(str(DATA / "valid.txt")))
        return ids[: len(ids) * 4 // 5]
    return tokenize(tokenizer, load_text(str(SHARED / "text" / f"{name}.txt")))


def measure(
    source: str,
    steps: list[dict[str, Any]],
    text: tuple[int, int, tuple[str, ...]] | None,
    token_fisher: float = 0,
    drift: float = 0,
) -> dict[str, Any]:
    checkpoint, device = open_model(source), device_named("auto")
    model = Model(checkpoint, device=device)
    count, length, names = text or (8, 512, ("valid",))
    recipe = read(
        {"steps": steps, "calibration": {"data": str(DATA / "valid.txt")}},
        ["samples=8", "length=512", f"allocation_samples={count}", f"token_fisher={token_fisher}", f"drift={drift}"],
    )
    tokenizer, vocabulary = checkpoint.tokenizer(), model.config.vocab_size
    data = load_calibration(tokenizer, recipe.calibration, vocabulary, 8)
    if text:
        share = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
        ids = [
            samples(pool(source, n, tokenizer, vocabulary, k * length), k, length, 0)
            for n, k in zip(names, share, strict=True)
        ]
        data = replace(data, ids=torch.cat(ids))
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="lissom-held-out-") as folder, torch.no_grad():
        model, _ = smaller_model(model, recipe, data, Path(folder), torch.float32)
        plan = make_plan(model, recipe)
        model, floors = earlier_shots(model, plan, data, Path(folder) / "shots")
        extras = for_recipe(model, data.ids, Path(folder), recipe)
        budgets, _ = budgets_for(model, plan, data, extras=extras, floors=floors)
        loss = trial_loss(model, plan, budgets, data, extras=extras)
    return {"perplexity": math.exp(loss), "cpu_seconds": round(time.process_time() - started, 1), "device": device.type}


def render(found: dict[str, dict[str, Any]]) -> str:
    def cell(name: str) -> str:
        if not (row := found.get(name)):
            return " | "
        return f"{row['perplexity']:.1f} | " + (f"{row['cpu_seconds']:.0f}" if on_host(row) else "GPU")

    def table(title: str, names: list[str]) -> list[str]:
        head = ["", f"| {title} | perplexity | CPU seconds |", "|---|---|---|"]
        return head + [f"| {n} | {cell(n)} |" for n in names if n in found]

    steps = [n for n in ROWS if n.startswith("70%")]
    lines = table("steps", steps)
    lines += table("tokens weighed by the gradient", list(TOKENS))
    lines += table("drift made up for", [*DRIFT, *MORE])
    lines += table("calibration of clusters + alps at 70%", ["70% clusters, alps", *TEXTS])
    lines += table("N of 16", [n for n in ROWS if n not in steps])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    found = {row["name"]: row for row in map(json.loads, lines)}
    rows: dict[str, tuple[Any, ...]] = {name: (steps, None) for name, steps in ROWS.items()}
    rows |= {name: (steps, None, e) for name, (steps, e) in TOKENS.items()}
    rows |= {name: (steps, None, e, d) for name, (steps, e, d) in DRIFT.items()}
    rows |= {name: (steps, (32, 512, ("valid",)), 0, d) for name, (steps, d) in MORE.items()}
    rows |= {name: (BEST, text) for name, text in TEXTS.items()}
    waiting = [n for n in shared(list(rows), options.share) if n not in found and re.search(options.only, n)]
    if options.list:
        print("\n".join(waiting))
    elif not options.render:
        for name in waiting:
            found[name] = {"name": name, "steps": rows[name][0], **measure(options.model, *rows[name])}
            if options.model == "demo":
                with KEPT.open("a") as file:
                    file.write(json.dumps(found[name]) + "\n")
            print(f"{name:40} {found[name]['perplexity']:8.2f} {found[name]['cpu_seconds']:6.1f} s", flush=True)
    into_results("held-out", [render(found)])


if __name__ == "__main__":
    main()
