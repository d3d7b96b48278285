"""Generation, server and bench on the C++ engine. Nothing here loads torch before weights have to be packed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import ContextError, Engine
    from .generation import Generation, Runner, generate
    from .sampling import RequestError, Sampling
    from .scheduler import BusyError, Scheduler, generate_batch
    from .start import open_runner

_HOME = {
    "BusyError": "scheduler",
    "ContextError": "engine",
    "Engine": "engine",
    "Generation": "generation",
    "RequestError": "sampling",
    "Runner": "generation",
    "Sampling": "sampling",
    "Scheduler": "scheduler",
    "generate": "generation",
    "generate_batch": "scheduler",
    "open_runner": "start",
}
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
    "open_runner",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lissom.run' has no attribute {name!r}")
    return getattr(import_module(f"lissom.run.{_HOME[name]}"), name)
