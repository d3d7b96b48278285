"""What a run keeps in ``OUT.partial``: what it is, and the hidden states after the newest finished block."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..core import OutputError

Note = Callable[[str], None]


def check_writable(target: Path) -> None:
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"no permission to write into {parent}")


def start(work: Path, identity: Mapping[str, Any], resume: bool, note: Note | None) -> None:
    """Make or re-enter the working directory; refuses to go on when the run's inputs changed."""
    path = work / "run.json"
    if work.exists() and not resume:
        shutil.rmtree(work)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = differences(before, json.loads(json.dumps(identity)))
        if changed:
            raise OutputError(
                f"{work} holds an unfinished run with other inputs:\n  "
                + "\n  ".join(changed)
                + "\ngo on with the old inputs, start over with --fresh, or choose another OUT"
            )
        if note:
            note(f"resuming the unfinished run in {work}")
        return
    if work.exists():
        shutil.rmtree(work)  # a run that was killed before it had a name
    work.mkdir(parents=True)
    dump_json(path, identity)


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d for key in dict.fromkeys([*a, *b]) for d in differences(a.get(key), b.get(key), f"{at}.{key}".lstrip("."))
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{at}[{i}]")]
    return [] if a == b else [f"{at}: was {a!r}, now {b!r}"]


def dump_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; what is finished is kept, free space and run again"
        ) from error
    os.replace(temporary, path)


def hidden_files(work: Path) -> dict[int, Path]:
    """Hidden states on disk by the number of blocks that made them."""
    return {int(p.stem.split("-")[1]): p for p in work.glob("hidden-*.safetensors")}


def first_sample(hidden: Mapping[str, Tensor]) -> Tensor:
    return hidden["00000"][:1]


def keep_hidden(work: Path, done: int, hidden: list[Tensor], dense: list[Tensor]) -> None:
    """Save the hidden states after ``done`` blocks (and the dense model's, if they go along), then drop the older ones."""
    temporary, path = work / "hidden.new", work / f"hidden-{done:05d}.safetensors"
    states = {f"{i:05d}": h.contiguous() for i, h in enumerate(hidden)}
    states |= {f"dense-{i:05d}": h.contiguous() for i, h in enumerate(dense)}
    try:
        save_file(states, temporary)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        size = sum(h.numel() * h.element_size() for h in states.values())
        raise OutputError(
            f"cannot write {path} ({size / 1e6:.1f} MB): {error}. What is finished is kept: make room and run again"
        ) from error
    os.replace(temporary, path)
    for number, old in hidden_files(work).items():
        if number != done:
            old.unlink()
