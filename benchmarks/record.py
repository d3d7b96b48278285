"""High sparsity, measured on artefacts: the record and its seeds, the curve, the ablation, and N of 16 beside unstructured.

    .venv/bin/python benchmarks/record.py [--only PATTERN] [--list] [--render]

Protocol and machinery of main_table.py: 32 × 512 calibration tokens, 16 windows of 1024 tokens of the raw test text, one
`lissom compress` and one `lissom evaluate` a row. Finished rows are kept in benchmarks/rows/record/ and not run again; delete
a file to repeat it. `--render` writes the tables into benchmarks/RESULTS.md between their markers, and the figure
benchmarks/figures/sparsity.png from these rows, the main table's and those of the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from pathlib import Path

from main_table import HERE, measure
from study import into_results

KEPT = HERE / "rows" / "record"
WHOLE = ["--set", "bits=16", "--set", "embedding_bits=16"]  # zeros only
DRIFT = 0.25  # as recipe `aggressive` has it
SEEDS = (0, 1, 2)
GAPS = (4, 6)


def once(seed: int) -> list[str]:
    """Plain uniform SparseGPT as its reference code does it."""
    return ["--recipe", "sparsegpt", "--set", "sparsity=0.7", "--set", "statistics=block", "--seed", str(seed)]


def best(sparsity: float = 0.7, *more: str) -> list[str]:
    return ["--recipe", "aggressive", *WHOLE, "--set", f"sparsity={sparsity}", *more]


def gap(n: int, drift: float = DRIFT) -> dict[str, list[str]]:
    sparsity = 1 - n / 16
    share = ["--set", f"drift={drift}"]
    plain = ["--recipe", "alps", "--set", f"sparsity={sparsity}", *share]
    permuted, by_layer = (str(HERE / "recipes" / f"n-16-{name}.yaml") for name in ("permuted", "by-layer"))
    layers = ["--recipe", by_layer, "--set", f"sparsity={sparsity}", *share]
    by_row = ["--recipe", "sparse-n-16", *WHOLE, "--set", f"sparsity={sparsity}", *share]
    rows = {
        f"unstructured {sparsity:.1%}": plain,
        f"{n}:16": [*plain, "--set", f"pattern={n}:16"],
        f"{n}:16 permuted": ["--recipe", permuted, "--set", f"pattern={n}:16", *share],
        f"{n}:16 by row": [*plain, "--set", "pattern=n:16 by row"],
        f"{2 * n}:32": [*plain, "--set", f"pattern={2 * n}:32"],
        f"clusters unstructured {sparsity:.1%}": best(sparsity, "--set", "row_fisher=0", *share),
        f"clusters N:16 {sparsity:.1%}": layers,
        f"clusters N:16 by row {sparsity:.1%}": [*by_row, "--set", "row_fisher=0"],
        f"clusters N:32 {sparsity:.1%}": [*layers, "--set", "pattern=n:32"],
        f"clusters, Fisher unstructured {sparsity:.1%}": best(sparsity, *share),
        f"clusters, Fisher N:16 by row {sparsity:.1%}": by_row,
    }
    return {f"{name}{_without(drift)}": arguments for name, arguments in rows.items()}


def _without(drift: float) -> str:
    return "" if drift else " no drift"


TABLES: dict[str, dict[str, list[str]]] = {
    "record": {f"{name} seed {s}": make(s) for s in SEEDS for name, make in (
        ("sparsegpt once per block", once), ("aggressive without INT4", lambda s: best(0.7, "--seed", str(s))))},
    "gap": {name: arguments for n in GAPS for d in (DRIFT, 0) for name, arguments in gap(n, d).items()},
    "curve": {f"aggressive without INT4 {s:.0%}": best(s) for s in (0.5, 0.6, 0.8)},
    "ablation": {
        "sparsegpt after each stage": ["--recipe", "sparsegpt", "--set", "sparsity=0.7"],
        "loss clusters": ["--recipe", "loss-clusters", "--set", "sparsity=0.7", "--set", "bits=16"],
        "alps": best(0.7, "--set", "row_fisher=0", "--set", "drift=0"),
        "rows by Fisher": best(0.7, "--set", "drift=0"),
        "INT4 in the same sweep": [
            "--recipe", "aggressive", "--set", "gptq-descent.bits=16", "--set", "alps.bits=4", "--set", "alps.group_size=128",
        ],
        "with INT4": ["--recipe", "aggressive"],
    },
}  # fmt: skip


def path_of(name: str) -> Path:
    return KEPT / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def claimed(lock: Path) -> bool:
    """Whether this process may run the row: no other living one has it."""
    try:
        os.kill(int(lock.read_text()), 0)
        return False
    except (OSError, ValueError):
        lock.write_text(str(os.getpid()))
        return True


def found(name: str) -> dict | None:
    path = path_of(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def perplexity(name: str) -> float | None:
    row = found(name) if name else None
    return row["evaluate"]["perplexity"] if row else None


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def number(x: float | None) -> str:
    return f"{x:.1f}" if x else ""


def record_table() -> list[str]:
    lines = [
        "| seed of the calibration | SparseGPT, once per block | `aggressive` without INT4 | ratio |",
        "|---|---|---|---|",
    ]
    pairs = []
    for s in SEEDS:
        a, b = perplexity(f"aggressive without INT4 seed {s}"), perplexity(f"sparsegpt once per block seed {s}")
        if a or b:
            lines.append(f"| {s} | {number(b)} | {number(a)} | {ratio(a, b)} |")
        if a and b:
            pairs.append((b, a, a / b))
    if len(pairs) > 1:
        columns = zip(*pairs, strict=True)
        cells = [f"{statistics.mean(c):.3g} ± {statistics.stdev(c):.2g}" for c in columns]
        lines.append(f"| mean ± standard deviation | {' | '.join(cells)} |")
    return lines


def _names(budgets: str, sparsity: str) -> list[str]:
    return [f"{budgets} {pattern} {sparsity}" for pattern in ("unstructured", "N:16", "N:16 by row", "N:32")]


def gap_table() -> list[str]:
    lines = [
        "| sparsity | drift | budgets | unstructured | N:16 | ratio | N:16 by row | ratio | N:32 | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n, drift in ((n, d) for n in GAPS for d in (DRIFT, 0)):
        s = f"{1 - n / 16:.1%}"
        for budgets, names in (
            ("uniform", (f"unstructured {s}", f"{n}:16", f"{n}:16 by row", f"{2 * n}:32")),
            ("uniform, inputs reordered", (f"unstructured {s}", f"{n}:16 permuted", "", "")),
            ("loss clusters", _names("clusters", s)),
            ("loss clusters, rows by Fisher", _names("clusters, Fisher", s)),
        ):
            beside, *others = (perplexity(name and name + _without(drift)) for name in names)
            if any(others):
                cells = (f"{number(p)} | {ratio(p, beside)}" for p in others)
                lines.append(f"| {s} | {drift} | {budgets} | {number(beside)} | {' | '.join(cells)} |")
    return lines


def rows_table(names: dict[str, str]) -> list[str]:
    """Label → row. Times are left out: these rows ran beside other jobs, on two machines."""
    rows = [f"| {label} | {number(perplexity(name))} |" for label, name in names.items() if found(name)]
    return ["| | perplexity |", "|---|---|", *rows]


DENSE = 22.88
SPARSITIES = (50, 60, 70, 80)
# label → (file under rows/ for a sparsity in per cent, colour, line)
CURVES = {
    "Wanda": ("wanda-{}.json", "#9aa5ad", "-"),
    "llm-compressor SparseGPT": ("peers/llm-compressor-sparsegpt-{}.json", "#c0392b", "--"),
    "SparseGPT": ("sparsegpt-{}.json", "#66757f", "-"),
    "OWL": ("owl-{}.json", "#8e6bbf", "-"),
    "equal marginal loss": ("equal-marginal-{}.json", "#b8860b", "-"),
    "ATP": ("atp-{}.json", "#2e8b57", "-"),
    "loss clusters": ("loss-clusters-{}.json", "#2874a6", "-"),
    "aggressive, no INT4": ("record/aggressive-without-int4-{}.json", "#d35400", "-"),
}


def figure() -> None:
    """Perplexity against sparsity, of every allocation and solver that was measured, and of the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown, ax = plt.subplots(figsize=(9, 5.5))
    for label, (pattern, colour, line) in CURVES.items():
        points = []
        for s in SPARSITIES:
            path = HERE / "rows" / pattern.format(s)
            row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if pattern.startswith("record") and s == 70:
                row = found("aggressive without INT4 seed 0")
            if row:
                points.append((s, row["evaluate"]["perplexity"]))
        if points:
            strong = pattern.startswith("record")
            ax.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=4, label=label,
                    linewidth=2.5 if strong else 1.3, zorder=3 if strong else 2)  # fmt: skip
    ax.axhline(DENSE, color="#22303c", linewidth=1, linestyle=":")
    ax.annotate(f"dense {DENSE}", (50, DENSE), xytext=(0, -11), textcoords="offset points", fontsize=8)
    ax.set_yscale("log")
    ax.set_ylim(18, 2000)
    ticks = (20, 50, 100, 200, 500, 1000, 2000)
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xticks(SPARSITIES, [f"{s}%" for s in SPARSITIES])
    ax.set_xlabel("weights of the linear layers removed")
    ax.set_ylabel("perplexity, WikiText-2 raw test (log)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e8ecef", linewidth=0.8)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    shown.savefig(folder / "sparsity.png", dpi=120, bbox_inches="tight", metadata={"Software": None})


def render() -> None:
    tables = {
        "record": record_table(),
        "gap": gap_table(),
        "curve": rows_table({
            f"`aggressive` without INT4, {s}%": "aggressive without INT4 " + ("seed 0" if s == 70 else f"{s}%")
            for s in SPARSITIES
        }),
        "ablation": rows_table({
            "uniform SparseGPT, statistics once per block": "sparsegpt once per block seed 0",
            "statistics after each stage": "sparsegpt after each stage",
            "budgets by loss clusters": "loss clusters",
            "ALPS in place of SparseGPT": "alps",
            "rows compared by the power of the gradient": "rows by Fisher",
            "a quarter of the drift made up for": "aggressive without INT4 seed 0",
            "INT4 in the sweep with which ALPS ends": "INT4 in the same sweep",
            "INT4 by descent instead (`aggressive`)": "with INT4",
        }),
    }  # fmt: skip
    for mark, lines in tables.items():
        into_results(mark, lines)
    figure()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    for table, rows in TABLES.items():
        for name, arguments in rows.items():
            if options.render or not re.search(options.only, name):
                continue
            if options.list or path_of(name).exists():
                print(f"{table:10} {name:42} {number(perplexity(name))}")
                continue
            if not claimed(path_of(name).with_suffix(".running")):
                continue
            result = measure(name, arguments)
            path_of(name).with_suffix(".running").unlink()
            path_of(name).write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(f"{table:10} {name:42} {result['evaluate']['perplexity']:.2f}", flush=True)
    render()


if __name__ == "__main__":
    main()
