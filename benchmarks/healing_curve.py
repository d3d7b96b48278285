"""Perplexity against minutes: one-shot pruning, block-wise reconstruction, distillation of the demo model at 70%.

    .venv/bin/python benchmarks/healing_curve.py [--case 70|4:16+int4] [--stage STAGE] [--set SETTINGS] [--keep FOLDER]

Every stage is one `lissom compress` and one `lissom evaluate` of the files on disk (WikiText-2 raw test, 16 × 1024); `heal` goes on
from the directory of `reconstruct`, which `--keep` keeps: ten minutes on one thread, an hour on two (`hour`), and with a GPU, one minute and more (`gpu-minute`, `gpu`). Rows are in benchmarks/rows/healing/, the figure in
benchmarks/figures/healing.png. One-shot and reconstruction calibrate on SAMPLES × 512 tokens of WikiText-2 v1 validation, as
everywhere; distillation reads Brown and ABC alone. The minutes of `one-shot`, `reconstruct` and `heal` are those of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml
from main_table import DATA, HERE, evaluation_on, lissom

ROWS, FIGURE = HERE / "rows" / "healing", HERE / "figures" / "healing.png"
CASES = {
    "70": ["--set", "sparsity=0.7", "--format", "dense"],
    "4:16+int4": ["--set", "pattern=4:16", "--set", "sparsity=null", "--set", "bits=4", "--set", "group_size=64", "--format", "packed"],
}  # fmt: skip
HEAL = {
    "use": "heal", "teacher": "demo", "steps": 100_000, "minutes": 10.0, "batch": 4, "length": 256, "learning_rate": 3e-4,
    "warmup": 0.1, "held_out": 8, "evaluate_every": 8, "precision": "bfloat16",
}  # fmt: skip
ON_GPU = {
    "batch": 16,
    "length": 512,
    "learning_rate": 1e-3,
    "device": "cuda",
    "precision": "auto",
    "evaluate_every": 200,
}
TRAININGS = {
    "heal": {},
    "hour": {"minutes": 60.0, "evaluate_every": 32},  # on both cores
    "gpu-minute": {**ON_GPU, "minutes": 1.0},
    "gpu": {**ON_GPU, "minutes": 8.75},
}
STAGES = ("one-shot", "reconstruct", *TRAININGS)


def training_text(folder: Path) -> str:
    """Brown and ABC, one after the other, in a file in ``folder``."""
    path = folder / "training.txt"
    parts = [(DATA.parent / "text" / f"{name}.txt").read_text(encoding="utf-8") for name in ("brown", "abc")]
    path.write_text("".join(parts), encoding="utf-8")
    return str(path)


def path_of(case: str, stage: str) -> Path:
    return ROWS / f"{case.replace(':', '-').replace('+', '-')}-{stage}.json"


def run(case: str, stage: str, folder: Path, samples: int, more: dict[str, Any]) -> dict[str, Any]:
    common = ["--calibration", str(DATA / "valid.txt"), "--length", "512"]
    common += ["--samples", "1" if stage in TRAININGS else str(samples)]  # distillation has its own text
    out, step = folder / stage, None
    if stage in TRAININGS:
        recipe = folder / f"{stage}.yaml"
        step = {**HEAL, **TRAININGS[stage], **more, "data": training_text(folder)}
        recipe.write_text(json.dumps({"steps": [step]}), encoding="utf-8")
        given = [str(folder / "reconstruct"), str(out), "--recipe", str(recipe), *CASES[case][-2:]]
    else:
        given = [
            "demo",
            str(out),
            "--recipe",
            {"one-shot": "sparsegpt", "reconstruct": "sparsegpt-healed"}[stage],
            *CASES[case],
        ]
    made = lissom("compress", *given, *common)
    seen = lissom("evaluate", str(out), *evaluation_on("test.raw.txt"))
    return {
        "case": case, "stage": stage, "samples": samples, "threads": os.environ.get("OMP_NUM_THREADS", "all"), "seconds": made["seconds"], "stages": made["stages"],
        "perplexity": seen["perplexity"], "sparsity": seen["sparsity"], "bytes": seen["bytes"], "healing": made["healing"],
        "training": step and {k: v for k, v in step.items() if k != "data"},
    }  # fmt: skip


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.5))
    for case, colour in zip(CASES, ("tab:blue", "tab:orange"), strict=True):
        rows = [json.loads(p.read_text()) for s in STAGES if (p := path_of(case, s)).exists()]
        # one-shot and reconstruction both start from the dense model; every training goes on from the reconstructed one
        at = next((r["seconds"] / 60 for r in rows if r["stage"] == "reconstruct"), 0.0)
        points = [(r["seconds"] / 60 + at * (r["stage"] in TRAININGS), r["perplexity"], r["stage"]) for r in rows]
        for on, style in (("", "o-"), ("gpu", "s--")):
            line = [p[:2] for p in points if p[2].startswith("gpu") == bool(on) or (on and p[2] == "reconstruct")]
            label = f"{case} (artefacts, raw test)" + (", trained on an H100" if on else "")
            if len(line) > bool(on):
                ax.plot(*zip(*line, strict=True), style, color=colour, label=label)
        for x, y, stage in points:
            below = stage.startswith("gpu")
            place = {"xytext": (0, -10) if below else (4, 6), "ha": "center" if below else "left"}
            place["va"] = "top" if below else "baseline"
            words = f"{stage.removeprefix('gpu-')}\n{y:.1f}" if below else f"{stage} {y:.1f}"
            ax.annotate(words, (x, y), textcoords="offset points", fontsize=8, color=colour, **place)
    dense = json.loads((HERE / "rows" / "dense.json").read_text())["evaluate"]["perplexity"]
    ax.axhline(dense, color="grey", linestyle="--", linewidth=1)
    ax.text(
        0.01, dense, f"dense {dense:.2f}", transform=ax.get_yaxis_transform(), va="bottom", fontsize=8, color="grey"
    )
    ax.set_yscale("log")
    ax.set_yticks(ticks := [20, 30, 50, 80, 120, 180, 300, 500], [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("minutes; one thread (hour: two; dashed: H100)")
    ax.set_ylabel("perplexity, WikiText-2 raw test")
    ax.legend(fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", default="70", choices=list(CASES))
    parser.add_argument("--stage", default="", choices=["", *STAGES])
    parser.add_argument("--set", default="{}", help="settings of a training, as YAML: '{learning_rate: 1e-3}'")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/lissom-healing"))
    options = parser.parse_args()
    ROWS.mkdir(parents=True, exist_ok=True)
    folder = options.keep / options.case.replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for stage in [options.stage] if options.stage else [s for s in STAGES if "gpu" not in s]:
        path = path_of(options.case, stage)
        if not path.exists():
            row = run(options.case, stage, folder, options.samples, yaml.safe_load(options.set))
            path.write_text(json.dumps(row, indent=1))
            print(options.case, stage, f"{row['perplexity']:.2f} after {row['seconds']:.0f} s", flush=True)
    draw()


if __name__ == "__main__":
    main()
