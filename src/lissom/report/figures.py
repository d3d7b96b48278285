"""Pictures of a manifest, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

_INK = "#22303c"
_SOFT = "#66757f"
_PARTS = ("attention", "mlp", "embedding and rest")  # the order of the bars


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
        label = str(k)
        if clustered:
            ends = {order[-1]: " (largest loss)", order[0]: " (smallest loss)"} if len(order) > 1 else {}
            label = f"cluster {k}{ends.get(k, '')}"
        top.scatter(chosen, [rows[i]["sparsity"] for i in chosen], s=12, color=colour[k], label=label)
        shown = [i for i in chosen if rows[i].get("relative_error") is not None]
        bottom.scatter(shown, [max(rows[i]["relative_error"], 1e-9) for i in shown], s=12, color=colour[k])
    mean = sum(r["sparsity"] * r["weights"] for r in rows) / max(sum(r["weights"] for r in rows), 1)
    top.axhline(mean, color=_SOFT, linewidth=1, linestyle="--", zorder=1)
    top.annotate(
        f"mean {mean:.1%}", (1, mean), xycoords=("axes fraction", "data"), xytext=(3, 0),
        textcoords="offset points", va="center", fontsize=8, color=_SOFT,
    )  # fmt: skip
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    top.set_ylabel("zeros", fontsize=9)
    bottom.set_ylabel("error / output energy", fontsize=9)
    if any(r.get("relative_error") for r in rows):
        bottom.set_yscale("log")
        bottom.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        plain = FuncFormatter(lambda y, _: f"{y:g}")
        bottom.yaxis.set_major_formatter(plain)
        bottom.yaxis.set_minor_formatter(plain if _decades(rows) < 1.5 else NullFormatter())
        bottom.tick_params(axis="y", which="minor", labelsize=8, colors=_INK)
    bottom.set_xlabel("linear layer, in the order of the model", fontsize=9)
    top.legend(fontsize=7, frameon=False, ncols=min(len(order), 5), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _png(figure)


def _decades(rows: Sequence[Mapping[str, Any]]) -> float:
    """Powers of ten that the relative errors span."""
    errors = [r["relative_error"] for r in rows if r.get("relative_error")]
    return math.log10(max(errors) / min(errors)) if errors else 0.0


def blocks(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Mean relative error of the layers of each block."""
    figure, ax = _axes(10, 2.6)
    numbers = sorted({r["block"] for r in rows})
    means = []
    for b in numbers:
        values = [r["relative_error"] for r in rows if r["block"] == b and r.get("relative_error") is not None]
        means.append(sum(values) / len(values) if values else 0.0)
    ax.bar(numbers, means, color="#3f7cac", width=0.7)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("block", fontsize=9)
    ax.set_ylabel("mean error / energy", fontsize=9)
    return _png(figure)


def parts(before: Mapping[str, float], after: Mapping[str, float]) -> bytes:
    """Bytes by part, dense and compressed, as two stacked bars."""
    figure, ax = _axes(10, 1.9)
    names = sorted({*before, *after}, key=lambda n: _PARTS.index(n) if n in _PARTS else len(_PARTS))
    unit, scale = ("MB", 1e6) if max(sum(before.values()), sum(after.values())) >= 1e6 else ("kB", 1e3)
    palette = plt.get_cmap("Set2")
    for y, values in ((1, before), (0, after)):
        left = 0.0
        for i, name in enumerate(names):
            width = values.get(name, 0) / scale
            ax.barh(y, width, left=left, color=palette(i % 8), label=name if y else None, height=0.6)
            left += width
        ax.text(left, y, f" {left:,.1f} {unit}", va="center", fontsize=9, color=_INK)
    ax.set_yticks([1, 0], ["dense", "compressed"])
    ax.set_xlabel(f"{unit} on disk", fontsize=9)
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.legend(fontsize=7, frameon=False, ncols=min(len(names), 8), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _png(figure)
