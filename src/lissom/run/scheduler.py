"""Continuous batching: sequences join and leave between steps of the engine (Orca, OSDI 2022).

A step is a flat list of tokens – one of every sequence that decodes, then chunks of waiting prompts up to a budget –
so batches of unequal length cost nothing for padding and a long prompt delays the others by one chunk at most. What is left of a
length-aware scheduler (TurboTransformers, 2010.05680, groups lengths to avoid padding) is the order of prompts: the one with the fewest
tokens left goes first, and each step that a prompt waited counts for a chunk of tokens, so that long ones are only overtaken by
what came at most ``length / chunk`` steps later. A sequence is admitted when the cache has room for all that it may become, so
none is ever stopped half-way.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import LissomError
from ..kernels.native import extension
from .engine import BLOCK, CHUNK
from .generation import Generation, Runner
from .sampling import Sampling
from .text import TextStream


class BusyError(LissomError):
    """The waiting line is full, or the scheduler is closing: try again later."""


@dataclass(eq=False)
class Job:
    """One sequence. ``on_piece(job, text, done)`` is called from the scheduler's thread; ``done`` once, at the end."""

    prompt: list[int]
    sampling: Sampling
    room: int
    on_piece: Callable[[Job, str, bool], None] | None = None
    result: Generation = field(default_factory=Generation)
    error: Exception | None = None
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)
    first: float | None = None  # seconds to the first token
    blocks: int = 0  # of the cache, at most
    arrived: int = 0  # the step that it came before
    # while it runs
    slot: int = -1
    read: int = 0  # positions in the cache
    seen: list[int] = field(default_factory=list)
    stream: TextStream | None = None


class Scheduler:
    """``chunk``: tokens of one step; ``waiting``: jobs that may wait for a slot before :class:`BusyError`."""

    def __init__(self, runner: Runner, chunk: int = CHUNK, waiting: int = 64):
        self.runner, self.engine = runner, runner.engine
        self.chunk, self.limit = chunk, waiting
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.tokens_read = self.tokens_made = self.finished = self.steps = 0
        self._free = list(range(self.engine.slots))[::-1]
        self._blocks = self.engine.free_positions // BLOCK
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def job(
        self, prompt: Sequence[int], sampling: Sampling, on_piece: Callable[[Job, str, bool], None] | None = None
    ) -> Job:
        """A job that fits the context; :class:`ContextError` otherwise."""
        room = self.runner.room(prompt, sampling)
        return Job(list(prompt), sampling, room, on_piece, blocks=self.engine.blocks_for(len(prompt) + room))

    def submit(self, job: Job) -> None:
        """Add a job; :class:`BusyError` when the line is full or closed."""
        with self._wake:
            if self._closing:
                raise BusyError("the server is shutting down")
            if len(self.waiting) >= self.limit + len(self._free):  # a free slot takes its job at the next step
                raise BusyError(f"{len(self.waiting)} requests are waiting already: try again later")
            job.arrived = self.steps
            self.waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job at the next step; its slot and cache become free."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def start(self) -> None:
        """Run steps in a thread of their own until :meth:`close`."""
        self._thread = threading.Thread(target=self._loop, name="lissom-scheduler", daemon=True)
        self._thread.start()

    def close(self, patience: float = 30.0) -> None:
        """Refuse new jobs, let the running ones finish for ``patience`` seconds, then cancel the rest."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is None:
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            with self._wake:
                for job in [*self.waiting, *self.running]:
                    job.cancelled = True
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self.waiting and not self.running and not self._closing:
                    self._wake.wait()
                if self._closing and not self.waiting and not self.running:
                    return
            self.step()

    def drain(self) -> None:
        """Run steps in this thread until no job is left."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> None:
        """Admit what fits, run one step of the engine, hand out its tokens."""
        for job in [j for j in self.running if j.cancelled]:
            self._end(job, "length")
        self._admit()
        if not self.running:
            return
        self.steps += 1
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        want: list[bool] = []
        drawing: list[Job] = []
        budget = max(self.chunk, len(self.running))
        for job in sorted(self.running, key=self._turn):
            count = min(len(job.seen) - job.read, budget)
            if count <= 0:
                continue
            budget -= count
            tokens += job.seen[job.read : job.read + count]
            slots += [job.slot] * count
            positions += range(job.read, job.read + count)
            last = job.read + count == len(job.seen)
            want += [False] * (count - 1) + [last]
            self.tokens_read += min(count, max(0, len(job.prompt) - job.read))
            job.read += count
            if last:
                drawing.append(job)
        try:
            logits = self.engine.step(tokens, slots, positions, want)
        except Exception as error:  # every sequence of this step is lost, the scheduler is not
            for job in list(self.running):
                job.error = error
                self._end(job, "length")
            return
        for job, row in zip(drawing, logits, strict=True):
            self._take(job, row)

    def _turn(self, job: Job) -> int:
        """Order of prompts: tokens left, less a chunk for each step since they came. Those that decode go first."""
        left = len(job.seen) - job.read if job.slot >= 0 else len(job.prompt)
        return left + (job.arrived - self.steps) * self.chunk if left > 1 or job.slot < 0 else -(2**62)

    def _admit(self) -> None:
        with self._wake:
            for job in [j for j in self.waiting if j.cancelled]:
                self.waiting.remove(job)
                self._tell(job, "", True)
            while self.waiting and self._free:
                job = min(self.waiting, key=self._turn)
                if job.blocks > self._blocks:  # nothing overtakes it: it would wait for ever
                    break
                self.waiting.remove(job)
                job.slot = self._free.pop()
                self._blocks -= job.blocks
                job.seen = list(job.prompt)
                job.stream = TextStream(self.runner.tokenizer, job.sampling.stop)
                job.result.prompt_tokens = len(job.prompt)
                self.running.append(job)

    def _take(self, job: Job, logits: np.ndarray) -> None:
        assert extension is not None and job.stream is not None
        how, made = job.sampling, len(job.result.tokens)
        seen = job.seen if how.repetition_penalty != 1 else []
        token = extension.sample(logits, how.core(), seen, how.seed, made)
        self.tokens_made += 1
        if job.first is None:
            job.first = time.monotonic() - job.started
        if token in self.runner.ends:
            self._end(job, "stop")
            return
        job.seen.append(token)
        job.result.tokens.append(token)
        piece = job.stream.push(token)
        if job.stream.stopped:
            self._end(job, "stop", piece)
        elif len(job.result.tokens) >= job.room:
            self._end(job, "length", piece)
        elif piece:
            self._tell(job, piece, False)

    def _end(self, job: Job, why: str, piece: str = "") -> None:
        assert job.stream is not None
        piece += job.stream.finish()
        job.result.text = job.stream.text
        job.result.finish = "stop" if why == "stop" or job.stream.stopped else "length"
        self.engine.release(job.slot)
        with self._wake:
            self.running.remove(job)
            self._free.append(job.slot)
            self._blocks += job.blocks
        self.finished += 1
        self._tell(job, piece, True)

    @staticmethod
    def _tell(job: Job, piece: str, done: bool) -> None:
        if job.on_piece is not None:
            job.on_piece(job, piece, done)


def generate_batch(runner: Runner, prompts: Sequence[str | Sequence[int]], sampling: Sampling) -> list[Generation]:
    """Continue several prompts together, without padding; each result equals that of its prompt alone."""
    scheduler = Scheduler(runner, waiting=len(prompts))
    jobs = [scheduler.job(runner.encode(p), sampling) for p in prompts]
    for job in jobs:
        scheduler.submit(job)
    scheduler.drain()
    for job in jobs:
        if job.error is not None:
            raise job.error
    return [job.result for job in jobs]
