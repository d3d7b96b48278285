"""lissom makes large language models smaller and faster, and says honestly what that cost.

    import lissom

    lissom.compress("demo", "out", "aggressive")
    lissom.evaluate("out", data="text.txt", against="demo")
    model = lissom.load("out")              # a transformers model

The names below are loaded when first used, so that ``import lissom`` stays cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch reads this when it makes its first large tensor. With huge pages a fresh one of 40 MB costs 440 page faults instead of 10,000,
# and a compression makes many.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_HOME = {
    "compress": "pipeline",
    "plan": "pipeline",
    "inspect": "pipeline",
    "evaluate": "evaluate",
    "load": "export",
    "load_encoder": "export",
    "unpack": "export",
    "open_model": "export",
    "write_report": "report",
    "LissomError": "core",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .core import LissomError
    from .evaluate import evaluate
    from .export import load, load_encoder, open_model, unpack
    from .pipeline import compress, inspect, plan
    from .report import write_report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lissom' has no attribute {name!r}")
    return getattr(import_module(f"lissom.{_HOME[name]}"), name)
