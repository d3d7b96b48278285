"""Compress a model under two recipes and compare what they cost.

    python examples/compress_and_evaluate.py MODEL FOLDER [SPARSITY]

FOLDER receives one directory per recipe, each with its report.html.
"""

import sys
from pathlib import Path

import lissom

MODEL = sys.argv[1]
FOLDER = Path(sys.argv[2])
SPARSITY = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5

CALIBRATION = {"samples": 8, "length": 64}
RECIPES = {
    "magnitude": {"steps": [{"use": "magnitude", "sparsity": SPARSITY}], "calibration": CALIBRATION},
    "joint": {
        "steps": [{"use": "loss-clusters"}, {"use": "sparsegpt", "sparsity": SPARSITY, "bits": 4, "group_size": 32}],
        "save": {"format": "packed"},
        "calibration": CALIBRATION,
    },
}

FOLDER.mkdir(parents=True, exist_ok=True)
print(f"{'recipe':12} {'MB':>8} {'zeros':>7} {'perplexity':>11} {'KL':>7}")
for name, recipe in RECIPES.items():
    out = FOLDER / name
    made = lissom.compress(MODEL, out, recipe)
    seen = lissom.evaluate(out, "builtin-heldout", length=64, count=8, against=MODEL)
    lissom.write_report(out)
    print(
        f"{name:12} {made['bytes'] / 1e6:8.2f} {made['sparsity']:7.1%} {seen['perplexity']:11.2f} {seen['kl']:7.3f}"
        f"   (dense {seen['dense_perplexity']:.2f})"
    )
