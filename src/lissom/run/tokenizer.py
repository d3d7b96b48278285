"""A tokenizer on the ``tokenizers`` library alone: transformers takes seconds to import, this takes milliseconds.

:func:`describe` keeps what is needed of a transformers tokenizer, and only when :class:`Tokenizer` gives the same ids,
texts and chats on samples of everything that tokenizers are known to differ in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

_SAMPLES = (
    "Hello, world!  Two  spaces,\ttabs\n\nand lines. ",
    " leading space; ünïcödé, 漢字, 🙂🙃 and don't I'll we're 3.14159 2,718",
    "def f(x):\n    return x ** 2  # code\n",
    "<s></s><|im_start|>user<|im_end|><|endoftext|> special",
    "",
)
_CHATS = (
    [{"role": "user", "content": "Hi "}],
    [
        {"role": "system", "content": " Be kind.\n"},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ],
)


class Tokenizer:
    """The part of a transformers tokenizer that the runtime uses. ``data``: the text of a tokenizer.json."""

    def __init__(self, data: bytes, special: dict[str, Any], chat_template: str | None):
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(data.decode("utf-8"))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._special, self.chat_template = special, chat_template
        self.bos_token_id: int | None = special.get("bos_token_id")
        self.eos_token_id: int | None = special.get("eos_token_id")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False):
        assert not clean_up_tokenization_spaces
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        assert not tokenize and self.chat_template
        known = {k: v for k, v in self._special.items() if not k.endswith("_id")}
        return _template(self.chat_template).render(
            messages=[dict(m) for m in messages], tools=None, documents=None,
            add_generation_prompt=add_generation_prompt, **known,
        )  # fmt: skip


def _template(text: str) -> Any:
    """A chat template, compiled as transformers does: sandboxed, with its filters and functions."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # marks of what an assistant said, for training: they print nothing, but trim the lines around them as blocks do
    text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", text)
    return environment.from_string(re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text))


def describe(tokenizer: Any) -> tuple[bytes, dict[str, Any], str | None] | None:
    """What :class:`Tokenizer` needs to stand in for a transformers tokenizer, or None where it would not be the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    if backend is None or not isinstance(template, str | None):
        return None
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    special |= {k: getattr(tokenizer, k, None) for k in ("bos_token_id", "eos_token_id")}
    found = backend.to_str().encode("utf-8"), special, template
    try:
        return found if _same(Tokenizer(*found), tokenizer) else None
    except Exception:  # templates and tokenizers raise what their authors thought of: the original stays in use
        return None


def _same(mine: Tokenizer, theirs: Any) -> bool:
    for text in _SAMPLES:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            if mine.encode(text, add_special_tokens=special) != ids:
                return False
            for cut in (ids, ids[1:], ids[: len(ids) // 2]):
                plain = theirs.decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                if mine.decode(cut) != plain:
                    return False
    if mine.chat_template is None:
        return True
    return all(_chat(mine, chat) == _chat(theirs, chat) for chat in _CHATS)


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """The text of a chat, None where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # see describe
        return None
