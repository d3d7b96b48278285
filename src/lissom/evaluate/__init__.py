"""Measuring artefacts on disk."""

from .perplexity import evaluate, forward, token_losses
from .text import NAMED, fingerprint, load_text, samples, tokenize, windows

__all__ = ["NAMED", "evaluate", "fingerprint", "forward", "load_text", "samples", "token_losses", "tokenize", "windows"]
