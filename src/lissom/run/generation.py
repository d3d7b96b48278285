"""Generation for one prompt: greedy or sampled, streamed or at once, with or without a draft model.

Speculative decoding (2211.17192) is exact here without a rejection step: the n-th draw of a text is a fixed number
of its seed, so the target *computes* the token that it would have chosen anyway, and a draft token counts only when
it is that token. The target checks ``draft_tokens`` proposals in one step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np

from ..core.errors import CheckpointError
from ..kernels.native import extension
from .engine import RETURN, ContextError, Engine
from .sampling import RequestError, Sampling
from .text import TextStream

Finish = Literal["stop", "length"]


@dataclass
class Generation:
    """``text`` and the ``tokens`` behind it; ``finish``: "stop" (end token or stop string) or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish = "length"
    prompt_tokens: int = 0
    accepted: int = 0  # draft tokens that were right
    drafted: int = 0


class Runner:
    """An engine with its tokenizer. ``model``: an :class:`Engine`, or whatever ``open_model`` takes."""

    def __init__(self, model: Any, **options: Any):
        self.engine = model if isinstance(model, Engine) else Engine(model, **options)
        self.tokenizer = self.engine.parts.tokenizer()
        self.ends = self.engine.parts.ends()

    def encode(self, prompt: str | Sequence[int] | Sequence[dict[str, str]]) -> list[int]:
        """Tokens of a text, of token ids, or of chat messages under the model's own template."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], dict):
            ids = self._chat(prompt)
        else:
            ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        problems: list[str] = []
        if not ids:
            start = self.tokenizer.bos_token_id
            if start is None:
                problems.append("the prompt is empty and the model has no token to begin with")
            else:
                ids = [int(start)]
        if not problems and any(not 0 <= i < self.engine.vocabulary for i in ids):
            problems.append(f"token ids must be in [0, {self.engine.vocabulary})")
        if problems:
            raise RequestError(problems)
        return ids

    def _chat(self, messages: Any) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
            return self.tokenizer.encode(text)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise what their authors thought of
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Tokens that may follow ``prompt``; :class:`ContextError` when the prompt itself does not fit."""
        limit = self.engine.longest
        if len(prompt) >= limit:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, the context holds {limit}: shorten it, or raise the context"
            )
        return min(sampling.max_tokens, limit - len(prompt))

    def pieces(
        self, prompt: Sequence[int], sampling: Sampling, result: Generation, draft: Runner | None = None,
        draft_tokens: int = 4, slot: int = 0, chunk: int = 1,
    ) -> Iterator[str]:  # fmt: skip
        """Pieces of text as they become certain; ``result`` is filled on the way. ``chunk``: tokens between pieces."""
        room = self.room(prompt, sampling)
        result.prompt_tokens = len(prompt)
        stream = TextStream(self.tokenizer, sampling.stop)
        tokens = (
            self._speculate(prompt, sampling, room, result, draft, draft_tokens, slot)
            if draft is not None
            else self._plain(prompt, sampling, room, slot, chunk)
        )
        try:
            for token in tokens:
                if token in self.ends:
                    result.finish = "stop"
                    break
                result.tokens.append(token)
                piece = stream.push(token)
                if piece:
                    yield piece
                if stream.stopped:
                    result.finish = "stop"
                    break
            piece = stream.finish()
            if stream.stopped:
                result.finish = "stop"
            if piece:
                yield piece
        finally:
            tokens.close()
            self.engine.release(slot)
            result.text = stream.text

    def _plain(
        self, prompt: Sequence[int], how: Sampling, room: int, slot: int, chunk: int
    ) -> Generator[int, None, None]:
        core, at, seen = how.core(), len(prompt), list(prompt)
        token = self._draw(self.engine.prefill(prompt, slot), core, seen, how.seed, 0)
        yield token
        made = 1
        while made < room:
            seen.append(token)
            count = min(chunk, room - made)
            out = self.engine.decode(
                token, at, count, core, slot, how.seed, made, self._penalised(how, seen), sorted(self.ends)
            )
            yield from out
            seen += out[:-1]
            made, at, token = made + len(out), at + len(out), out[-1]

    def _speculate(
        self, prompt: Sequence[int], how: Sampling, room: int, result: Generation, draft: Runner, width: int, slot: int
    ) -> Generator[int, None, None]:
        if draft.engine.vocabulary != self.engine.vocabulary:
            raise CheckpointError(
                f"the draft model has {draft.engine.vocabulary} tokens, the model {self.engine.vocabulary}: "
                "a draft must be of the same family"
            )
        core, seen = how.core(), list(prompt)
        token = self._draw(self.engine.prefill(prompt, slot), core, seen, how.seed, 0)
        known = 0  # positions of `seen` that the draft has read
        made = 1
        seen.append(token)
        try:
            yield token
            while made < room:
                at = len(seen) - 1  # position of `token`, not yet in the target's cache
                count = min(width, room - made - 1, draft.engine.longest - len(seen), RETURN - 2)
                guess: list[int] = []
                if count > 0:
                    if known < at:
                        draft.engine.prefill(seen[known:at], 0, known)
                    guess = draft.engine.decode(token, at, count, core, 0, how.seed, made, self._penalised(how, seen))
                    known = at + len(guess)
                logits = self.engine.step([token, *guess], slot, at, "all")
                right = 0
                for i in range(len(guess) + 1):
                    token = self._draw(logits[i], core, seen, how.seed, made)
                    seen.append(token)
                    made += 1
                    yield token
                    if i < len(guess) and token == guess[i]:
                        right += 1
                    else:
                        break
                known = min(known, at + right + 1)
                result.accepted += right
                result.drafted += len(guess)
        finally:
            draft.engine.release(0)

    def _draw(self, logits: np.ndarray, core: Any, seen: Sequence[int], seed: int, index: int) -> int:
        assert extension is not None
        return extension.sample(logits, core, seen if core.penalised else [], seed, index)

    @staticmethod
    def _penalised(how: Sampling, seen: Sequence[int]) -> Sequence[int]:
        return seen if how.repetition_penalty != 1 else ()


@overload
def generate(model: Any, prompt: Any, *, stream: Literal[False] = False, **settings: Any) -> Generation: ...
@overload
def generate(model: Any, prompt: Any, *, stream: Literal[True], **settings: Any) -> Iterator[str]: ...


def generate(
    model: Any,
    prompt: str | Sequence[int] | Sequence[dict[str, str]],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    stream: bool = False,
    draft: Any = None,
    draft_tokens: int = 4,
    **options: Any,
) -> Generation | Iterator[str]:
    """Continue ``prompt`` (text, token ids or chat messages).

    ``model`` and ``draft``: a :class:`Runner`, or a checkpoint to open with ``options`` (threads, context, …).
    ``stream``: return an iterator over pieces of text instead of a :class:`Generation`. Raises
    :class:`RequestError` for settings outside of their ranges, :class:`ContextError` for a prompt that is too long.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stops, seed)
    runner = model if isinstance(model, Runner) else Runner(model, **options)
    helper = draft if draft is None or isinstance(draft, Runner) else Runner(draft, **options)
    result = Generation()
    ids = runner.encode(prompt)
    runner.room(ids, sampling)
    pieces = runner.pieces(ids, sampling, result, helper, draft_tokens, chunk=1 if stream else 8)
    if stream:
        return pieces
    for _ in pieces:
        pass
    return result
