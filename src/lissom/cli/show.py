"""What the terminal sees: tables, progress bars, errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def emit(data: Any, as_json: bool) -> None:
    """JSON to standard output when asked for; the human form is the caller's."""
    if as_json:
        json.dump(data, sys.stdout, indent=2, default=str, allow_nan=True)
        sys.stdout.write("\n")


@contextmanager
def bar(quiet: bool = False) -> Iterator[Any]:
    """A callback ``tick(label, done, total)`` that draws one bar per label, with a rate and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet, transient=False, refresh_per_second=4) as progress:
        tasks: dict[str, Any] = {}

        def tick(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total, rate="")
            task = progress.tasks[progress.task_ids.index(tasks[label])]
            speed = task.speed
            progress.update(tasks[label], completed=done, total=total, rate=f"{speed:.2f}/s" if speed else "")

        yield tick


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def table(title: str, head: list[str], rows: list[list[Any]]) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in head:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def planned(layers: Sequence[Mapping[str, Any]], together: bool) -> Table:
    """The layers of a plan, equal ones counted; ``together``: one line a role with the range of its budgets."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in layers:
        budget = () if together else (row["sparsity"], row["bits"])
        shape = "×".join(map(str, row["shape"]))
        groups.setdefault((row["role"], shape, " → ".join(row["steps"]) or "kept", *budget), []).append(row)
    lines = []
    for (role, shape, steps, *_), rows in groups.items():
        zeros = sorted({row["sparsity"] for row in rows})
        bits = "/".join(str(b) for b in sorted({row["bits"] for row in rows}))
        span = f"{zeros[0]:.0%}" if len(zeros) == 1 else f"{zeros[0]:.0%} to {zeros[-1]:.0%}"
        lines.append([role, len(rows), shape, steps, span, bits])
    return table("", ["role", "layers", "shape", "steps", "sparsity", "bits"], lines)
