"""How the next token is chosen, checked where it is given."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..core.errors import LissomError
from ..kernels.native import extension


class RequestError(LissomError):
    """A request asks for something that the runtime cannot do. Holds *all* problems that were found."""

    exit_code = 2

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Sampling:
    """One request's settings.

    The rules apply in this order: repetition penalty (CTRL, once for each token that occurred), temperature, min-p
    (keep tokens with at least ``min_p`` times the probability of the best), top-k, top-p (the smallest set whose
    probability reaches ``top_p``). ``temperature`` 0 is greedy. The n-th draw depends on ``seed`` and n only, so a
    text does not change with batching, chunking or speculation.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []

        def need(ok: bool, text: str) -> None:
            if not ok:
                problems.append(text)

        need(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        need(
            isfinite(self.temperature) and 0 <= self.temperature <= 100,
            f"temperature must be in [0, 100], not {self.temperature}",
        )
        need(self.top_k >= 0, f"top_k must be at least 0 (0 = off), not {self.top_k}")
        need(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        need(0 <= self.min_p < 1, f"min_p must be in [0, 1), not {self.min_p}")
        need(
            isfinite(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty must be in [0.01, 100], not {self.repetition_penalty}",
        )
        need(all(self.stop), "stop strings must not be empty")
        need(0 <= self.seed < 2**63, f"seed must be in [0, 2⁶³), not {self.seed}")
        if problems:
            raise RequestError(problems)

    def core(self) -> Any:
        """The C++ form."""
        assert extension is not None
        return extension.Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
