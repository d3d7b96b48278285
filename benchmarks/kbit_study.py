"""k-bit scaling on one model: perplexity against total bits over bits × group size × sparsity (methods/02 §31).

    .venv/bin/python benchmarks/kbit_study.py [MODEL] [--groups 0,32,64,128] [--samples 8] [--windows 8] [--length 512] [--render]

One pass over the blocks for each group size; its rows go to benchmarks/rows/kbit/, and passes that are there are not run again.
Every choice is solved by the joint error-feedback sweep on the *dense* model's inputs (all choices of a pass in one stack), and
without zeros by rounding to nearest too. Evaluation windows stream along through each of the models, in memory, with the
embedding in 8 bits. Total bits are those of the packed form: codes of the weights that are not zero, masks, scales, zero
points, 8-bit embedding, norms. `--render` draws benchmarks/figures/kbit.png and prints the Pareto front.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from study import DATA, into_results, study_parser
from torch import Tensor

from lissom.core import Both, Grid, Problem, Sparse, Stack, Stats, sweep
from lissom.evaluate import load_text, token_losses, tokenize, windows
from lissom.export import open_model
from lissom.models import Linear, Model
from lissom.pipeline.curves import outer_as_saved
from lissom.pipeline.data import embed, load_calibration
from lissom.pipeline.prices import embedding_bytes, fixed_bytes, layer_bytes
from lissom.pipeline.recipe import Calibration, ConstraintSettings, Save
from lissom.pipeline.stream import stream_block

HERE = Path(__file__).parent
BITS, SPARSITIES = (2, 3, 4, 8), (0.0, 0.5, 0.7)
SAVE = Save("packed", embedding_bits=8)
Choice = tuple[str, int, float]  # method, bits, sparsity


def choices() -> list[Choice]:
    return [("rtn", b, 0.0) for b in BITS] + [("sweep", b, s) for b, s in product(BITS, SPARSITIES)]


def solved(W: Tensor, stats: Stats, group: int, found: list[Choice]) -> Iterator[tuple[Choice, Tensor]]:
    """The weights (out, in) of a stage's stacked layers under every choice; sparsity is that of each stage."""
    size = group if 0 < group < W.shape[1] else None
    swept = [c for c in found if c[0] == "sweep"]
    parts = tuple((len(W), Both(Sparse(s) if s else None, Grid(b, size))) for _, b, s in swept)
    problem = Problem(W.repeat(len(swept), 1), stats, Stack(parts), (), None, {})
    many = sweep(problem, problem.factor(0.01)).weight
    yield from zip(swept, many.split(len(W)), strict=True)
    for choice in found:
        if choice[0] == "rtn":
            yield choice, Grid(choice[1], size).project(W)


@torch.no_grad()
def run_pass(model: Model, group: int, ids: Tensor, test: Tensor) -> list[dict[str, Any]]:
    """One row for each choice at this group size (0: one scale a row)."""
    found, start = choices(), time.perf_counter()
    dtype = torch.float16
    outer = outer_as_saved(model, SAVE, dtype)
    hidden = embed(model, ids)
    streams = {c: torch.cat(embed(model, test, outer)) for c in found}
    model.release()
    sizes = dict.fromkeys(found, 0.0)
    for i in range(model.blocks):
        block, weights = model.load_block(i), {}

        def visit(stage: tuple[Linear, ...], stats: Stats, block: Any = block, weights: Any = weights) -> None:
            W = torch.cat([block.weight(la.name) for la in stage])
            for choice, made in solved(W, stats, group, found):
                settings = ConstraintSettings(bits=choice[1], group_size=group)
                for la, own in zip(stage, made.split([la.rows for la in stage]), strict=True):
                    weights[choice, la.name] = own.clone()
                    zeros = float((own != 0).sum()) if choice[2] else None
                    sizes[choice] += layer_bytes(la, settings, choice[2], choice[1], zeros)

        hidden = stream_block(block, hidden, visit)
        for choice in found:
            for la in block.linears:
                block.set_weight(la.name, weights.pop((choice, la.name)))
            streams[choice] = torch.cat([block.forward(h) for h in streams[choice].split(4)])
        print(f"group {group}: block {i + 1}/{model.blocks}, {time.perf_counter() - start:.0f} s", flush=True)
    layers = [la for i in range(model.blocks) for la in model.linears(i)]
    rest = fixed_bytes(model, layers, dtype) + embedding_bytes(model, SAVE, 8)
    out = []
    for (method, bits, sparsity), h in streams.items():
        losses = torch.cat([token_losses(model, x[None], row, outer).flatten() for x, row in zip(h, test, strict=True)])
        size = sizes[method, bits, sparsity]
        out.append({
            "method": method, "bits": bits, "group": group, "sparsity": sparsity,
            "perplexity": float(losses.mean().exp()) if float(losses.mean()) < 700 else math.inf,
            "linear_bits_per_weight": 8 * size / sum(la.rows * la.columns for la in layers), "total_bits": 8 * (size + rest),
        })  # fmt: skip
    return out


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other one beats in both perplexity and bits, by rising bits."""
    out: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["total_bits"], r["perplexity"])):
        if not out or row["perplexity"] < out[-1]["perplexity"]:
            out.append(row)
    return out


def draw(rows: list[dict[str, Any]], dense: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(8.5, 5.2))
    colours, shapes = (
        dict(zip(BITS, ("#c0392b", "#e08e0b", "#2471a3", "#6c7a89"), strict=True)),
        {0.0: "o", 0.5: "s", 0.7: "^"},
    )
    for row in rows:
        swept = row["method"] == "sweep"
        ax.scatter(
            row["total_bits"] / 8e6, min(row["perplexity"], 1e4), s=34, marker=shapes[row["sparsity"]],
            facecolor=colours[row["bits"]] if swept else "none", edgecolor=colours[row["bits"]], linewidth=1.1,
        )  # fmt: skip
    best = front(rows)
    ax.plot(
        [r["total_bits"] / 8e6 for r in best], [r["perplexity"] for r in best], color="#22303c", linewidth=1, zorder=0
    )
    ax.axhline(dense["perplexity"], color="#66757f", linestyle="--", linewidth=0.9)
    ax.annotate(
        "dense", (1, dense["perplexity"]), xycoords=("axes fraction", "data"), fontsize=8, va="bottom", ha="right"
    )
    for b, colour in colours.items():
        ax.scatter([], [], color=colour, label=f"{b} bits")
    for s, shape in shapes.items():
        ax.scatter([], [], color="#22303c", marker=shape, label=f"{s:.0%} zeros")
    ax.scatter([], [], facecolor="none", edgecolor="#22303c", label="round to nearest")
    ax.set(
        xlabel="MB of the whole model (packed form, 8-bit embedding)", ylabel="perplexity (10⁴: or more)", yscale="log"
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = study_parser(__doc__, 8)
    parser.add_argument("--groups", default="128,32,64,0")
    parser.add_argument("--test", default=str(DATA / "test.raw.txt"))
    parser.add_argument("--rows", type=Path, default=HERE / "rows" / "kbit")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    if not options.render:
        model = Model(open_model(options.model))
        tokenizer = model.checkpoint.tokenizer()
        setting = Calibration(options.calibration, options.samples, options.length)
        ids = load_calibration(tokenizer, setting, model.config.vocab_size).ids
        test = windows(tokenize(tokenizer, load_text(options.test)), options.windows, options.length)
        dense = options.rows / "dense.json"
        if not dense.exists():
            with torch.no_grad():
                losses = []
                for row in test:
                    h = model.embed(row[None])
                    for i in range(model.blocks):
                        h = model.load_block(i).forward(h)
                    losses.append(token_losses(model, h, row).flatten())
            dense.write_text(json.dumps({"perplexity": float(torch.cat(losses).mean().exp())}))
        for group in map(int, options.groups.split(",")):
            path = options.rows / f"group-{group}.json"
            if not path.exists():
                path.write_text(json.dumps(run_pass(model, group, ids, test), indent=1))
    rows = [row for path in sorted(options.rows.glob("group-*.json")) for row in json.loads(path.read_text())]
    dense = json.loads((options.rows / "dense.json").read_text())
    draw(rows, dense, HERE / "figures" / "kbit.png")
    lines = ["| MB | perplexity | bits | group | zeros | method |", "|---|---|---|---|---|---|"]
    for r in front(rows):
        size, group = r["total_bits"] / 8e6, r["group"] or "row"
        lines.append(
            f"| {size:.1f} | {r['perplexity']:.2f} | {r['bits']} | {group} | {r['sparsity']:.0%} | {r['method']} |"
        )
    into_results("kbit", [f"Dense: {dense['perplexity']:.2f}.", "", *lines])


if __name__ == "__main__":
    main()
