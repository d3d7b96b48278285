"""The requests and answers of the HTTP server: the part of OpenAI's interface that a text model has."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from .generation import Generation
from .sampling import RequestError, Sampling

_MANY = 2**31 - 1
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=-_MANY, le=_MANY)]
Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=16)]


class Options(BaseModel):
    """What both kinds of completion share. Fields that lissom does not know are ignored, as OpenAI's server does."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr = ""
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Count | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    stop: Stop | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None
    logprobs: Any = None

    @property
    def usage_in_stream(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, most: int, index: int) -> Sampling:
        """The settings of choice ``index``; OpenAI's default temperature is 1. Raises :class:`RequestError`."""
        problems = []
        if self.logprobs not in (None, False, 0):
            problems.append("logprobs are not supported")
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                problems.append(f"{name} is not supported: use repetition_penalty")
        wanted = self.length
        if wanted is not None and wanted > most:
            problems.append(f"max_tokens is {wanted}, this server allows {most}")
        if problems:
            raise RequestError(problems)

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        seed = int.from_bytes(uuid.uuid4().bytes[:7]) if self.seed is None else self.seed
        return Sampling(
            max_tokens=given(wanted, most),
            temperature=given(self.temperature, 1.0),
            top_k=given(self.top_k, 0),
            top_p=given(self.top_p, 1.0),
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            seed=(seed + index) % 2**63,
        )

    @property
    def length(self) -> int | None:
        return self.max_tokens


class CompletionRequest(Options):
    """POST /v1/completions"""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    echo: StrictBool | None = None

    def prompts(self) -> list[Any]:
        if self.echo:
            raise RequestError("echo is not supported")
        one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)

    @property
    def length(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: StrictStr | list[TextPart] = ""

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Options):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    def prompts(self) -> list[Any]:
        return [[message.plain() for message in self.messages]]

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Answer:
    """Builds the JSON of one request."""

    def __init__(self, chat: bool, model: str):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, results: list[Generation]) -> dict[str, Any]:
        choices = []
        for i, result in enumerate(results):
            content = {"message": {"role": "assistant", "content": result.text}} if self.chat else {"text": result.text}
            choices.append({"index": i, **content, "logprobs": None, "finish_reason": result.finish})
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "usage": self.usage(results),
        }

    def piece(self, index: int, text: str, finish: str | None, first: bool = False) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            content = {"delta": delta | ({"content": text} if text or first else {})}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [choice]}

    def last(self, results: list[Generation]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [], "usage": self.usage(results)}

    @staticmethod
    def usage(results: list[Generation]) -> dict[str, int]:
        prompt, made = sum(r.prompt_tokens for r in results), sum(len(r.tokens) for r in results)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
