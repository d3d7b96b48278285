"""Where tensors are: the host keeps, a device computes.

Hidden states, results and files are on the host; a block and whatever is computed from its weights or its inputs is on the
device of the :class:`~lissom.models.Model`. Nothing is global: a method never names a device, it makes its tensors under :func:`on`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import RecipeError

HOST = torch.device("cpu")
T = TypeVar("T")


def device_named(name: str | torch.device) -> torch.device:
    """``auto``: a CUDA device where there is one, else the processor. Raises :class:`RecipeError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        float(torch.zeros(1, device=name))  # `meta` makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            f"device {name} cannot be used here: {str(error).splitlines()[0]}; leave it out, or say cpu"
        ) from error
    return torch.device(name)


def room(device: torch.device) -> int:
    """Bytes that new tensors on ``device`` can take; 0 where that is not known."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Tensors that are made from nothing are made on ``device`` meanwhile."""
    return nullcontext() if device.type == "cpu" else device  # entering a device costs every call of torch a little


def moved(thing: T, device: torch.device) -> T:
    """``thing`` with all tensors in its fields, values or entries on ``device``; itself where they are there already."""
    if isinstance(thing, Tensor):
        return thing.to(device)  # type: ignore[return-value]
    if isinstance(thing, Mapping):
        return {k: moved(v, device) for k, v in thing.items()}  # type: ignore[return-value]
    if isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
        return type(thing)(moved(v, device) for v in thing)  # type: ignore[return-value]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
        changed = {k: new for k, old in fields.items() if (new := moved(old, device)) is not old}
        return dataclasses.replace(thing, **changed) if changed else thing
    return thing
