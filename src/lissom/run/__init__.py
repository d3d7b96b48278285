"""Generation, server and bench on the C++ engine."""

from .engine import ContextError, Engine
from .generate import Generation, Runner, generate
from .sampling import RequestError, Sampling
from .scheduler import BusyError, Scheduler, generate_batch

__all__ = [
    "BusyError",
    "ContextError",
    "Engine",
    "Generation",
    "RequestError",
    "Runner",
    "Sampling",
    "Scheduler",
    "generate",
    "generate_batch",
]
