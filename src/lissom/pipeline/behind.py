"""Work that is done behind the device's back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Behind:
    """Jobs in their order, one at a time, beside what a device computes; on the processor, which would be shared, at once.

    A context. No more than one job waits or runs: :meth:`do` comes back when the one before it is done, and raises what that raised;
    so does leaving the context. After an error the job in flight is still finished.
    """

    def __init__(self, device: torch.device):
        self._pool = ThreadPoolExecutor(1) if device.type != "cpu" else None
        self._last: Future[object] | None = None

    def do(self, job: Callable[[], object]) -> None:
        if self._pool is None:
            job()
            return
        self._wait()
        self._last = self._pool.submit(job)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
