"""One process at a time works on one OUT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core import OutputError

try:
    import fcntl
except ImportError:  # no such locks on Windows: two runs on one OUT are not noticed there
    fcntl = None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold a lock that belongs to ``work`` until the end; the system frees it when the process dies, however it dies.

    The lock is on a file beside ``work``, which ``--fresh`` removes. Raises :class:`OutputError` when another process has it.
    """
    if fcntl is None:
        yield
        return
    path = work.with_name(work.name + ".lock")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another lissom process is working on {work}; wait for it, stop it, or choose another OUT"
            ) from error
        try:
            yield
        finally:
            os.unlink(path)
    finally:
        os.close(handle)
