"""Structured pruning of the demo model: every method at 10, 20, 30 and 50% fewer parameters, before and after a short healing.

    .venv/bin/python benchmarks/structured_table.py [--only PATTERN] [--seconds N] [--render]

Each row is a `lissom compress demo SMALL`, a `lissom compress SMALL HEALED` with `heal` alone against the dense model, and an
evaluation of both directories. Finished rows are kept in benchmarks/rows/structured/ and not run again; a stopped row starts
again. `--seconds`: start no further row after so many. `--render` only writes the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from main_table import DATA, HERE, lissom
from study import into_results

ROWS = HERE / "rows" / "structured"
LEVELS = (0.2, 0.5, 0.1, 0.3)  # parameters that go, of all (the embedding, 21%, included)
TEXT = DATA.parent / "text" / "brown.txt"
EVALUATION = ["--data", str(DATA / "test.raw.txt"), "--length", "512", "--windows", "8"]
CALIBRATION = ["--calibration", str(DATA / "valid.txt"), "--samples", "8", "--length", "512"]
HEAL = {
    "use": "heal", "teacher": "demo", "data": str(TEXT), "steps": 12, "batch": 4, "length": 128, "learning_rate": 5e-4,
    "warmup": 0.1, "held_out": 4, "evaluate_every": 12, "precision": "bfloat16",
}  # fmt: skip
TRAINED = {
    "steps": 12,
    "batch": 4,
    "length": 128,
    "held_out": 2,
    "evaluate_every": 12,
    "data": str(TEXT),
    "logits": 1.0,
}
# how each method spends a target: the proportion in which its kinds of units shrink
NEURONS, BOTH = {"keep_neurons": 0.5}, {"keep_heads": 0.667, "keep_neurons": 0.4}
METHODS: dict[str, dict[str, Any]] = {
    "random": NEURONS,
    "structured-magnitude": NEURONS,
    "flap": NEURONS,
    "llm-pruner": NEURONS,
    "surgeon-units": NEURONS,
    "shortgpt": {},
    "head-importance": {"keep_heads": 0.5},
    "sheared": {**BOTH, **TRAINED},
    "l0": {**NEURONS, **TRAINED, "keep_heads": 1.0},
    "compresso": {**NEURONS, **TRAINED, "keep_heads": 1.0, "learning_rate": 5e-4},
    "lorashear": {**NEURONS, **TRAINED, "learning_rate": 5e-4},
    "head-gates": {**TRAINED, "keep_heads": 0.5},
}
BLOCKS, PER_BLOCK, PARAMETERS = 30, 3_540_096, 134_515_008


def step(method: str, level: float) -> dict[str, Any]:
    """The recipe step that takes at least ``level`` of all parameters away."""
    if method == "shortgpt":
        gone = -(-level * PARAMETERS // PER_BLOCK)
        return {"use": method, "keep_blocks": (BLOCKS - gone) / BLOCKS}
    return {"use": method, **METHODS[method], "target": round(1 - level, 3), "of": "parameters"}


def rows() -> list[tuple[str, float]]:
    return [(m, level) for level in LEVELS for m in METHODS]


def path_of(method: str, level: float) -> Path:
    return ROWS / f"{method}-{level:.0%}.json".replace("%", "")


def recipe(folder: Path, *steps: dict[str, Any]) -> str:
    path = folder / f"recipe-{steps[0]['use']}.json"  # JSON is YAML
    path.with_suffix(".yaml").write_text(json.dumps({"steps": list(steps)}))
    return str(path.with_suffix(".yaml"))


def measure(method: str, level: float) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="lissom-structured-"))
    small, healed = str(work / "small"), str(work / "healed")
    try:
        try:
            made = lissom("compress", "demo", small, "--recipe", recipe(work, step(method, level)), *CALIBRATION)
        except SystemExit as refused:  # a target that this method cannot meet is a row too
            if "no shape meets target" not in str(refused) and "leaves none" not in str(refused):
                raise
            return {"method": method, "level": level, "refused": str(refused)[-600:]}
        before = lissom("evaluate", small, *EVALUATION)
        trained = lissom("compress", small, healed, "--recipe", recipe(work, HEAL), *CALIBRATION)
        after = lissom("evaluate", healed, *EVALUATION)
    finally:
        shutil.rmtree(work)
    return {
        "method": method, "level": level, "step": step(method, level), "before": before, "after": after,
        "seconds": {"prune": made["seconds"], "heal": trained["seconds"]},
    }  # fmt: skip


def render() -> str:
    found = {(r["method"], r["level"]): r for r in (json.loads(p.read_text()) for p in ROWS.glob("*.json"))}
    levels = sorted(LEVELS)
    lines = ["| method | " + " | ".join(f"{v:.0%} fewer" for v in levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for method in METHODS:
        cells = []
        for level in levels:
            row = found.get((method, level))
            cells.append("" if row is None else "cannot" if "refused" in row else _cell(row))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return " → ".join(f"{row[k]['perplexity']:,.1f}" for k in ("before", "after"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    ROWS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for method, level in rows():
        path, name = path_of(method, level), f"{method} {level:.0%}"
        if options.render or path.exists() or not re.search(options.only, name):
            continue
        if time.monotonic() - started > options.seconds:
            break
        result = measure(method, level)
        path.write_text(json.dumps(result, indent=1))
        print(name, "refused" if "refused" in result else _cell(result), flush=True)
    into_results("structured", [render()])


if __name__ == "__main__":
    main()
