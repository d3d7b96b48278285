"""k-bit scaling on one model: perplexity against total bits over bits × group size × sparsity (methods/02 §31).

    .venv/bin/python benchmarks/kbit_study.py [MODEL] [--groups 64,128,0,32] [--samples 8] [--windows 8] [--length 512] [--render]

Every choice is a model of its own, compressed in memory as a run would: GPTQ, or SparseGPT and GPTQ in one sweep, each layer on the
inputs that the compressed layers before it give; without zeros rounding to nearest too. Total bits are those of the packed form: codes
of the weights that are not zero, masks, scales, zero points, 8-bit embedding, norms. Rows go to benchmarks/rows/kbit.jsonl and are not
measured again. `--render` draws benchmarks/figures/kbit.png and writes the Pareto front into RESULTS.md.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from study import DATA, HERE, calibrated, into_results, judged, study_parser

from lissom.core import device_named
from lissom.export import open_model
from lissom.models import Model
from lissom.pipeline import read
from lissom.pipeline.constraints import ConstraintSettings
from lissom.pipeline.curves import outer_as_saved
from lissom.pipeline.prices import embedding_bytes, fixed_bytes, layer_bytes
from lissom.pipeline.sections import Save
from lissom.pipeline.stream import LayerResult

BITS, SPARSITIES = (2, 3, 4, 8), (0.0, 0.5, 0.7)
SAVE = Save("packed", embedding_bits=8)
Choice = tuple[str, int, int, float]  # method, bits, group (0: a row), sparsity


def choices(groups: list[int]) -> list[Choice]:
    kinds = [("rtn", 0.0), *(("sweep", s) for s in SPARSITIES)]
    return [(method, b, g, s) for g, b, (method, s) in product(groups, BITS, kinds)]


def step_of(choice: Choice) -> dict[str, Any]:
    method, bits, group, sparsity = choice
    grid = {"bits": bits, "group_size": group}
    if sparsity:
        return {"use": "sparsegpt", "sparsity": sparsity, **grid}
    return {"use": "rtn" if method == "rtn" else "gptq", **grid}


def measure(model: Model, choice: Choice, data: Any) -> dict[str, Any]:
    method, bits, group, sparsity = choice
    dtype, settings, size = torch.float16, ConstraintSettings(bits=bits, group_size=group), 0.0

    def weigh(result: LayerResult) -> None:
        nonlocal size
        zeros = float((result.solved.weight != 0).sum()) if sparsity else None
        size += layer_bytes(result.layer, settings, sparsity, bits, zeros)

    step = read([step_of(choice)]).steps[0]
    perplexity = judged(model, step, data, outer_as_saved(model, SAVE, dtype), weigh)
    layers = [la for i in range(model.blocks) for la in model.linears(i)]
    rest = fixed_bytes(model, layers, dtype) + embedding_bytes(model, SAVE, 8)
    return {
        "method": method, "bits": bits, "group": group, "sparsity": sparsity, "perplexity": perplexity,
        "linear_bits_per_weight": 8 * size / sum(la.rows * la.columns for la in layers), "total_bits": 8 * (size + rest),
    }  # fmt: skip


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
        [r["total_bits"] / 8e6 for r in best],
        [min(r["perplexity"], 1e4) for r in best],
        color="#22303c",
        linewidth=1,
        zorder=0,
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
    parser.add_argument("--test", default=str(DATA / "test.raw.txt"))
    parser.add_argument("--groups", default="64,128,0,32")
    parser.add_argument("--rows", type=Path, default=HERE / "rows" / "kbit.jsonl")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    rows = [json.loads(line) for line in lines]
    if not options.render:
        model, start = Model(open_model(options.model), device=device_named("auto")), time.perf_counter()
        data = calibrated(model, options)
        done = {(r["method"], r["bits"], r["group"], r["sparsity"]) for r in rows}
        for choice in choices([int(g) for g in options.groups.split(",")]):
            if choice not in done:
                rows.append(measure(model, choice, data))
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(*choice, f"{rows[-1]['perplexity']:.2f}, {time.perf_counter() - start:.0f} s", flush=True)
        if "dense" not in {r["method"] for r in rows}:
            plain = {"method": "dense", "bits": 16, "group": 0, "sparsity": 0.0}
            rows.append(plain | {"perplexity": judged(model, None, data), "total_bits": 8 * model.checkpoint.bytes})
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    dense = next(r for r in rows if r["method"] == "dense")
    rows = [r for r in rows if r is not dense]
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
