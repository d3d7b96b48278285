"""From tokens to text as it is produced: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class TextStream:
    """Turns tokens into pieces of text that never need to be taken back.

    Characters whose bytes are spread over tokens are held until they are whole, and so is a tail that may be the
    beginning of a stop string. ``stopped`` turns true when a stop string occurs; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._known = self._read = 0  # tokens that only give context, and tokens whose text is out
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after ``token``, "" when none is."""
        self._ids.append(token)
        before = self._decode(self._ids[self._known : self._read])
        now = self._decode(self._ids[self._known :])
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._pass(now[len(before) :])

    def finish(self) -> str:
        """What is still held, broken characters included."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._known : self._read])
        rest = self._decode(self._ids[self._known :])[len(before) :]
        self._known = self._read = len(self._ids)
        out = self._pass(rest)
        if not self.stopped:
            self.text += self._held
            out, self._held = out + self._held, ""
        return out

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _pass(self, new: str) -> str:
        text = self._held + new
        ends = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if ends:
            self.stopped, self._held = True, ""
            out = text[: min(ends)]
        else:
            hold = max((_overlap(text, s) for s in self._stop), default=0)
            out, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
