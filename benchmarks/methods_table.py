"""Every pruning method at every sparsity and pattern on the demo model, at a reduced cost; each row a saved and loaded artefact.

    .venv/bin/python benchmarks/methods_table.py [--only PATTERN] [--share 1/4] [--minutes M] [--list] [--render]

Protocol: 8 × 512 calibration tokens of WikiText-2 valid, seed 0; perplexity and KL (dense ‖ pruned, nats a token) of the first 8
windows of 256 tokens of the raw test text. The demo model is converted to dense float32 safetensors once. Every row runs in a
child of its own: `seconds` and `peak` are those of `lissom.compress` alone, on whatever else the machine does; where there is a GPU,
there (marked in the table, and not in its times). `--share 1/4`: the first of every four rows, for four calls at once. Rows are
kept in benchmarks/rows/methods.jsonl and not run again; delete a line to repeat it. The order is by column, the usual ones first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import forked
from study import into_results, on_host, shared

import lissom
from lissom.core import device_named
from lissom.evaluate import forward, load_text, token_losses, tokenize, windows
from lissom.export import open_model
from lissom.models import Model

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "wikitext2"
KEPT = HERE / "rows" / "methods.jsonl"
PROTOCOL = {"samples": 8, "length": 512, "windows": 8, "window": 256}
COLUMNS = ("70%", "50%", "2:4", "4:16", "60%", "80%", "4:8")

FIRST = ("magnitude", "wanda", "sparsegpt", "alps", "loss-clusters + alps")
SOLVERS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"use": "magnitude"}],
    "l-obd": [{"use": "l-obd"}],
    "wanda": [{"use": "wanda"}],
    "e-sparse": [{"use": "e-sparse"}],
    "ria": [{"use": "ria"}],
    "gblm": [{"use": "gblm"}],
    "obd": [{"use": "obd"}],
    "obs": [{"use": "obs"}],
    "llm-surgeon": [{"use": "llm-surgeon", "steps": 1, "iterations": 20}],
    "isc": [{"use": "isc"}],
    "sparsegpt": [{"use": "sparsegpt"}],
    "wanda, dsnot": [{"use": "wanda"}, {"use": "dsnot"}],
    "wanda, refit": [{"use": "wanda"}, {"use": "refit"}],
    "wanda, dsnot, refit": [{"use": "wanda"}, {"use": "dsnot"}, {"use": "refit"}],
    "sparsegpt, refit": [{"use": "sparsegpt"}, {"use": "refit"}],
    "alps": [{"use": "alps"}],
    "sparsegpt, rows by Fisher": [{"use": "sparsegpt", "row_fisher": 0.5}],
    "alps, rows by Fisher": [{"use": "alps", "row_fisher": 0.5}],
    "oats": [{"use": "oats"}],
}
SEARCH = {"use": "predictor-search", "plans": 12, "rounds": 1, "verify": 2, "trial_samples": 2, "trial_windows": 2}
ALLOCATIONS = {
    name: {"use": name}
    for name in (
        "owl",
        "atp",
        "alpha-pruning",
        "besa",
        "trace-steps",
        "equal-marginal",
        "global-threshold",
        "loss-clusters",
    )
} | {"predictor-search": SEARCH}
PERMUTED = ("ria", "sparsegpt", "alps")
WITHOUT = {"l-obs": "out · in³ multiplications, some 6 hours; measured on rows of real layers below"}


def steps_of(name: str, column: str) -> list[dict[str, Any]] | None:
    """The recipe of a row in a column; None where there is none (an allocation leaves N:M alone, but for N of 16 by layer)."""
    unstructured = column.endswith("%")
    n, m = (0, 0) if unstructured else map(int, column.split(":"))
    spend: dict[str, Any] = {"sparsity": float(column[:-1]) / 100} if unstructured else {"pattern": column}
    first, _, solver = name.partition(" + ")
    if not solver:
        solver, allocation = first, None
    elif first == "permuted":
        return None if unstructured else [{"use": "channel-permutation"}, *steps_of(solver, column)]  # type: ignore[misc]
    else:
        allocation = ALLOCATIONS[first]
        if m == 16:
            spend = {"sparsity": 1 - n / m, "pattern": "n:16"}
        elif not unstructured:
            return None
    head, *rest = SOLVERS[solver]
    if not unstructured and "row_fisher" in head:
        return None
    return [*([allocation] if allocation else []), head | spend, *rest]


def rows() -> list[tuple[str, str]]:
    names = [
        *SOLVERS,
        *(f"{a} + sparsegpt" for a in ALLOCATIONS),
        "loss-clusters + alps",
        "loss-clusters + alps, rows by Fisher",
    ]
    names += [f"permuted + {s}" for s in PERMUTED]
    names.sort(key=lambda name: name not in FIRST)
    return [(name, column) for column in COLUMNS for name in names if steps_of(name, column)]


def converted(source: str) -> Path:
    """The dense checkpoint, as float32 safetensors, in a folder that stays between calls."""
    folder = Path(tempfile.gettempdir()) / f"lissom-dense-{re.sub(r'[^a-z0-9]+', '-', source.lower())}"
    if not folder.exists():
        lissom.unpack(source, folder, dtype="float32")
    return folder


@torch.no_grad()
def judge(model: Model, dense: Model, reference: list[torch.Tensor], ids: torch.Tensor) -> dict[str, float]:
    """Perplexity, and KL(dense ‖ model) in nats a token."""
    seen = forward(model, ids)
    loss = kl = 0.0
    for h, g, row in zip(seen.hidden, reference, ids, strict=True):
        loss += float(token_losses(model, h, row).sum())
        p, q = (torch.log_softmax(m.head(x[:, :-1])[0].float(), -1) for m, x in ((dense, g), (model, h)))
        kl += float((p.exp() * (p - q)).sum())
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return {"perplexity": math.exp(min(loss / tokens, 700)), "kl": kl / tokens, "zeros": seen.zeros / seen.weights}


def keep_reference(source: Path, ids: torch.Tensor) -> None:
    """The dense model's last hidden states, beside it; made in a child, so that no row's peak starts with them."""
    if not (source / "reference.pt").exists():
        torch.save(forward(Model(open_model(source)), ids).hidden, source / "reference.pt")


def row(source: Path, steps: list[dict[str, Any]], ids: torch.Tensor) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="lissom-methods-"))
    try:
        recipe = {"steps": steps, "calibration": {"data": str(DATA / "valid.txt")}}
        overrides = [f"samples={PROTOCOL['samples']}", f"length={PROTOCOL['length']}"]
        started = time.process_time()
        made = lissom.compress(source, work / "out", recipe, overrides=overrides)
        out = {"seconds": made["seconds"], "cpu_seconds": time.process_time() - started, "peak": made["peak_rss_bytes"]}
        reference, there = torch.load(source / "reference.pt"), device_named("auto")
        models = [Model(open_model(folder), device=there) for folder in (work / "out", source)]
        return out | {"device": made["device"]} | judge(*models, reference, ids)
    finally:
        shutil.rmtree(work)


def render() -> str:
    found = {(r["name"], r["column"]): r for r in map(json.loads, KEPT.read_text().splitlines())}
    columns = [c for c in ("50%", "60%", "70%", "80%", "2:4", "4:8", "4:16") if any(c == k for _, k in found)]
    lines = [f"| | {' | '.join(columns)} | CPU seconds | peak MB |", f"|---|{'---|' * (len(columns) + 2)}"]
    for name in dict.fromkeys(name for name, _ in rows()):
        mine = {c: found[name, c] for c in columns if (name, c) in found}
        if not mine:
            continue
        cells = []
        for c in columns:
            r = mine.get(c)
            none = "–" if steps_of(name, c) is None else ""
            mark = "" if r is None or on_host(r) else " †"
            cells.append(r.get("failed") or f"{r['perplexity']:.4g} ({r['kl']:.2f}){mark}" if r else none)
        ran = [r for r in mine.values() if "failed" not in r and on_host(r)]
        last = f"{max(r['cpu_seconds'] for r in ran):.0f} | {max(r['peak'] for r in ran) / 1e6:.0f}" if ran else " | "
        lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
    lines += [f"| {name} | {reason} |{' |' * (len(columns) + 1)}" for name, reason in WITHOUT.items()]
    return "\n".join(lines)


PAGES = HERE.parent / "docs" / "methods"
_LINK = "[table of every method](../../benchmarks/RESULTS.md#every-method)"


def link_pages() -> None:
    """The line "Measured" of method pages that have rows here and no table of their own."""
    found = {(r["name"], r["column"]): r for r in map(json.loads, KEPT.read_text().splitlines()) if "failed" not in r}
    stands_for = {a: f"{a} + sparsegpt" for a in ALLOCATIONS} | {m: f"wanda, {m}" for m in ("dsnot", "refit")}
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        name = stands_for.get(page.stem, page.stem)
        rival = "sparsegpt" if page.stem in ALLOCATIONS else "wanda"
        mine = [c for c in sorted(COLUMNS, key=lambda c: (":" in c, len(c), c)) if (name, c) in found]
        if mine:
            pairs = [
                f"{c} {found[name, c]['perplexity']:.4g}"
                + (f" ({rival} {found[rival, c]['perplexity']:.4g})" if (rival, c) in found else "")
                for c in mine
            ]
            row = "" if name == page.stem else f", row `{name}`"
            line = f"**Measured.** In the {_LINK}{row}, perplexity: {'; '.join(pairs)}."
            text = re.sub(r"\*\*Measured\.\*\* [^\n]*" + re.escape(_LINK) + r"[^\n]*", lambda _, line=line: line, text)
            page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no row after so many")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    done = (
        {(r["name"], r["column"]) for r in map(json.loads, KEPT.read_text().splitlines())} if KEPT.exists() else set()
    )
    mine = shared(rows(), options.share)
    waiting = [(n, c) for n, c in mine if (n, c) not in done and re.search(options.only, f"{n} {c}")]
    if options.list:
        print("\n".join(f"{c:5} {n}" for n, c in waiting))
    elif not options.render:
        # in a child: the children of a process whose threads have run can wait for these forever
        source = forked(converted, options.model)
        if isinstance(source, Exception):
            raise source
        text = tokenize(open_model(source).tokenizer(), load_text(str(DATA / "test.raw.txt")))
        ids = windows(text, PROTOCOL["windows"], PROTOCOL["window"])
        forked(keep_reference, source, ids)
        started = time.monotonic()
        for name, column in waiting:
            if time.monotonic() - started > 60 * options.minutes:
                break
            result = forked(row, source, steps_of(name, column), ids)
            if isinstance(result, Exception):
                result = {"failed": f"{type(result).__name__}: {result}"}
            result = {"name": name, "column": column, "protocol": PROTOCOL, **result}
            if options.model == "demo":
                with KEPT.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            print({k: v for k, v in result.items() if k != "protocol"}, flush=True)
    if KEPT.exists():
        into_results("methods", [render()])
        link_pages()


if __name__ == "__main__":
    main()
