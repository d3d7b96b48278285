"""Pictures of a manifest, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_INK = "#22303c"
_SOFT = "#9aa7b1"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _axes(width: float, height: float, rows: int = 1) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(rows, 1, figsize=(width, height), sharex=rows > 1)
    for ax in [axes] if rows == 1 else axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=_INK, labelsize=8)
        ax.grid(axis="y", color="#e8ecef", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def layers(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Sparsity and relative error of every layer, in the order of the model, coloured by cluster (else by role)."""
    figure, (top, bottom) = _axes(10, 5, 2)
    clustered = any(r.get("cluster") is not None for r in rows)
    keys = [r["cluster"] if clustered else r["role"] for r in rows]
    order = sorted(set(keys)) if clustered else list(dict.fromkeys(keys))
    palette = plt.get_cmap("viridis" if clustered else "tab10")
    colour = {k: palette(i / max(len(order) - 1, 1) if clustered else i % 10) for i, k in enumerate(order)}
    x = range(len(rows))
    for k in order:
        chosen = [i for i in x if keys[i] == k]
        label = f"cluster {k} ({'smallest' if k == order[0] else 'largest' if k == order[-1] else 'middle'} loss)"
        label = label if clustered else str(k)
        top.scatter(chosen, [rows[i]["sparsity"] for i in chosen], s=12, color=colour[k], label=label)
        shown = [i for i in chosen if rows[i].get("relative_error") is not None]
        bottom.scatter(shown, [max(rows[i]["relative_error"], 1e-9) for i in shown], s=12, color=colour[k])
    top.set_ylabel("zeros (fraction)", fontsize=9)
    bottom.set_ylabel("error / output energy", fontsize=9)
    if any(r.get("relative_error") for r in rows):
        bottom.set_yscale("log")
    bottom.set_xlabel("linear layer, in the order of the model", fontsize=9)
    top.legend(fontsize=7, frameon=False, ncols=min(len(order), 5), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _png(figure)


def blocks(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Mean relative error of the layers of each block."""
    figure, ax = _axes(10, 2.6)
    numbers = sorted({r["block"] for r in rows})
    means = []
    for b in numbers:
        values = [r["relative_error"] for r in rows if r["block"] == b and r.get("relative_error") is not None]
        means.append(sum(values) / len(values) if values else 0.0)
    ax.bar(numbers, means, color="#3f7cac")
    ax.set_xlabel("block", fontsize=9)
    ax.set_ylabel("mean error / energy", fontsize=9)
    return _png(figure)


def parts(before: Mapping[str, float], after: Mapping[str, float]) -> bytes:
    """Bytes by part, dense and compressed, as two stacked bars."""
    figure, ax = _axes(10, 1.9)
    names = list(dict.fromkeys([*before, *after]))
    palette = plt.get_cmap("Set2")
    for y, values in ((1, before), (0, after)):
        left = 0.0
        for i, name in enumerate(names):
            width = values.get(name, 0) / 1e6
            ax.barh(y, width, left=left, color=palette(i % 8), label=name if y else None, height=0.6)
            left += width
        ax.text(left, y, f" {left:.1f} MB", va="center", fontsize=9, color=_INK)
    ax.set_yticks([1, 0], ["dense", "compressed"])
    ax.set_xlabel("MB on disk", fontsize=9)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.legend(fontsize=7, frameon=False, ncols=min(len(names), 8), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _png(figure)
