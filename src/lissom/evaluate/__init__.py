"""Measuring artefacts on disk."""

import sys
from types import ModuleType

from .perplexity import evaluate, forward, token_losses
from .text import NAMED, fingerprint, load_text, samples, tokenize, windows

__all__ = ["NAMED", "evaluate", "fingerprint", "forward", "load_text", "samples", "token_losses", "tokenize", "windows"]


class _Room(ModuleType):
    """Python binds ``lissom.evaluate`` to this room as soon as anything imports it; the public function has the same
    name, so the room can be called as the function."""

    __call__ = staticmethod(evaluate)


sys.modules[__name__].__class__ = _Room
