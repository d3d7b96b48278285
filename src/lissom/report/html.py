"""``report.html``: one self-contained page from ``manifest.json``, ``timings.json`` and ``evaluations.json``."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ..core import OutputError
from . import figures


def _read(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise OutputError(f"{path} is not valid JSON ({error}); compress again or remove it") from error


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def remember(folder: Path, result: dict[str, Any]) -> None:
    """Keep one evaluation beside the checkpoint; a new one on the same data and windows replaces the old."""
    path = folder / "evaluations.json"
    known = _read(path, [])
    key = [result.get(k) for k in ("data", "length", "windows", "against")]
    known = [r for r in known if [r.get(k) for k in ("data", "length", "windows", "against")] != key]
    _write(path, json.dumps([*known, result], indent=2).encode())


def write_report(folder: Path) -> Path:
    """Write the page and its PNGs into ``folder``; raises :class:`OutputError` when it holds no manifest."""
    manifest = _read(folder / "manifest.json", None)
    if manifest is None:
        raise OutputError(f"{folder} has no manifest.json: give a directory that `lissom compress` wrote")
    timings, evaluations = _read(folder / "timings.json", {}), _read(folder / "evaluations.json", [])
    rows = manifest["layers"]
    pictures = {
        "layers": figures.layers(rows),
        "blocks": figures.blocks(rows),
        "bytes": figures.parts(manifest["bytes_before"], manifest["bytes_after"]),
    }
    for name, data in pictures.items():
        _write(folder / f"report-{name}.png", data)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = _size
    environment.filters["num"] = _number
    page = environment.from_string(template).render(
        m=manifest,
        t=timings,
        evaluations=evaluations,
        images={k: base64.b64encode(v).decode() for k, v in pictures.items()},
        roles=_by_role(rows),
    )
    path = folder / "report.html"
    _write(path, page.encode())
    return path


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _number(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:.2e}" if x and (abs(x) < 1e-3 or abs(x) >= 1e5) else f"{x:,.4g}"


def _by_role(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the layers of each role."""
    out = []
    for role in dict.fromkeys(r["role"] for r in rows):
        members = [r for r in rows if r["role"] == role]
        weights = sum(r["weights"] for r in members)
        errors = [r["relative_error"] for r in members if r["relative_error"] is not None]
        out.append(
            {
                "role": role,
                "layers": len(members),
                "shape": "×".join(map(str, members[0]["shape"])),
                "sparsity": sum(r["sparsity"] * r["weights"] for r in members) / weights,
                "least": min(r["sparsity"] for r in members),
                "most": max(r["sparsity"] for r in members),
                "bits": sorted({r["bits"] for r in members}),
                "error": sum(errors) / len(errors) if errors else None,
                "bytes": sum(r["bytes"] for r in members),
            }
        )
    return out
