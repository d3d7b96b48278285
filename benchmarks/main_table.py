"""The main table: every base method on the demo model, through the command line, measured on what was saved.

    .venv/bin/python benchmarks/main_table.py [--only PATTERN] [--render]

Each row is one `lissom compress` and one `lissom evaluate`. Finished rows are kept in benchmarks/rows/ and not run again;
delete a file to repeat it. `--render` writes the table into benchmarks/RESULTS.md between its markers.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from study import into_results

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "wikitext2"
LISSOM = str(Path(sys.executable).with_name("lissom"))
PROTOCOL = ["--samples", "32", "--length", "512"]
SPARSE = ["magnitude", "wanda", "sparsegpt", "owl", "loss-clusters", "equal-marginal", "atp"]


# run by record.py with the same protocol: name here → file there
RECORD = {"aggressive without INT4 70%": "aggressive-without-int4-seed-0", "aggressive": "with-int4"}


def rows() -> dict[str, list[str]]:
    """Row name → arguments of `lissom compress demo OUT`."""
    out: dict[str, list[str]] = {"dense": []}
    for sparsity in (0.7, 0.5, 0.6, 0.8):
        for name in SPARSE:
            out[f"{name} {sparsity:.0%}"] = ["--recipe", name, "--set", f"sparsity={sparsity}", "--set", "bits=16"]
    for bits in (3, 4):
        for name in ("rtn", "gptq"):
            out[f"{name} INT{bits} g128"] = ["--recipe", name, "--set", f"bits={bits}", "--set", "group_size=128"]
    joint = ["--set", "sparsity=0.7", "--set", "group_size=128", "--format", "packed"]
    out["joint sparsegpt 70% + INT4"] = ["--recipe", "sparsegpt", "--set", "bits=4", *joint]
    out["prune-then-rtn 70% + INT4"] = ["--recipe", "prune-then-rtn", *joint]
    out["atp + alps 70%"] = ["--recipe", str(HERE / "recipes" / "atp-alps.yaml")]
    out["scheduler"] = ["--recipe", "scheduler"]
    return out


def calibration() -> list[str]:
    return ["--calibration", str(DATA / "valid.txt"), *PROTOCOL]


def evaluation_on(text: str) -> list[str]:
    return ["--data", str(DATA / text), "--length", "1024", "--windows", "16"]


def lissom(*arguments: str) -> dict:
    done = subprocess.run([LISSOM, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lissom {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def measure(name: str, arguments: list[str]) -> dict:
    evaluation = evaluation_on("test.raw.txt")
    if not arguments:
        return {"name": name, "command": "lissom evaluate demo …", "evaluate": lissom("evaluate", "demo", *evaluation)}
    work = Path(tempfile.mkdtemp(prefix="lissom-bench-"))
    try:
        out = str(work / "out")
        made = lissom("compress", "demo", out, *arguments, *calibration())
        seen = lissom("evaluate", out, *evaluation)
        tokenised = lissom("evaluate", out, *evaluation_on("test.txt")) if name.endswith("70%") else None
    finally:
        shutil.rmtree(work)
    keep = ("seconds", "stages", "peak_rss_bytes", "bytes", "bits_per_weight", "linear_bits_per_weight", "sparsity")
    return {
        "name": name,
        "command": "lissom compress demo OUT " + " ".join(arguments),
        "compress": {k: made[k] for k in keep},
        "evaluate": seen,
        "perplexity_v1": tokenised and tokenised["perplexity"],
    }


def render() -> str:
    kept = [json.loads(p.read_text()) for p in (HERE / "rows").glob("*.json")]  # of other studies too
    order = list(rows())
    found = sorted((r for r in kept if r.get("name") in order), key=lambda r: order.index(r["name"]))
    found += [json.loads((HERE / "rows" / "record" / f"{p}.json").read_text()) | {"name": n} for n, p in RECORD.items()]
    lines = [
        "| recipe | perplexity | v1 text | zeros | bits/weight (linear layers) | MB on disk | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        c, e = row.get("compress", {}), row["evaluate"]
        v1 = f"{row['perplexity_v1']:.2f}" if row.get("perplexity_v1") else ""
        lines.append(
            f"| {row['name']} | {e['perplexity']:.2f} | {v1} | {e['sparsity']:.1%} | {c.get('linear_bits_per_weight', 16):.2f} | "
            f"{e['bytes'] / 1e6:.1f} | {c.get('seconds', 0):.0f} | {c.get('peak_rss_bytes', 0) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    (HERE / "rows").mkdir(exist_ok=True)
    for name, arguments in rows().items():
        path = HERE / "rows" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
        if options.render or path.exists() or not re.search(options.only, name):
            continue
        print(name, flush=True)
        result = measure(name, arguments)
        path.write_text(json.dumps(result, indent=1))
        print(f"  perplexity {result['evaluate']['perplexity']:.2f}", flush=True)
    into_results("main", [render()])


if __name__ == "__main__":
    main()
