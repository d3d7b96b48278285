"""A device that every machine has: tensors "on" it are held by the processor, but refuse to meet tensors of the host.

`lazy` is a device type that torch knows by name and has no library for. A tensor there is an :class:`OnDevice` around one of the
host, which does the arithmetic, so that results are the same bits as on the host. As on a GPU, an operation on tensors of both
places fails (scalars may come from anywhere, a mask or index of the host may index), so does one that draws there with a generator of the
host, and numpy cannot read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

TYPE = "lazy"
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class OnDevice(Tensor):
    """A tensor of the device; ``held`` is its value, of the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        shape, like = held.size(), {"dtype": held.dtype, "device": torch.device(TYPE, 0)}
        out = Tensor._make_wrapper_subclass(cls, shape, held.stride(), held.storage_offset(), **like)
        out.held = held
        return out

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, asked = func._schema.name, kwargs.get("device")
    here, host = [], []

    def held(t: Any) -> Any:
        if isinstance(t, OnDevice):
            here.append(t)
            return t.held
        if isinstance(t, Tensor) and t.dim():
            host.append(t)
        return t

    plain, more = tree_map(held, args), tree_map(held, kwargs)
    if asked is not None:
        if torch.device(asked).type == TYPE and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: the generator is of the host and the numbers are to be on the device")
        more["device"] = torch.device("cpu")
    if name == "aten::copy_":  # the only one that reads from one place and writes to the other
        func(*plain, **more)
        return args[0]
    if name in _INDEXING and isinstance(args[0], OnDevice):
        indices = [t for t in args[1] if t is not None]
        host = [t for t in host if not any(t is index for index in indices)]
    if here and host:
        places = [("device", *t.shape) for t in here] + [("host", *t.shape) for t in host]
        raise RuntimeError(f"{name}: tensors are not on one device: {places}")
    out = func(*plain, **more)
    there = torch.device(asked).type == TYPE if asked is not None else bool(here)
    if func._schema.is_mutable:
        mine = {id(t.held): t for t in here}
        return tree_map(lambda t: mine.get(id(t), t), out)
    return tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out) if there else out


class _Data(TorchFunctionMode):
    """What goes between tensors and Python's numbers without asking a dispatch mode: by way of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and torch.device(given.get("device") or "cpu").type == TYPE:
            return func(*args, **given | {"device": "cpu"}).to(TYPE)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].held.tolist()
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return args[0].held.new_tensor(*args[1:], **given).to(TYPE)
        return func(*args, **given)


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on and moved to the device."""

    def __enter__(self) -> Device:
        self._data = _Data()
        self._data.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._data.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = (kwargs or {}).get("device")
        if asked is not None and torch.device(asked).type == TYPE:
            return _call(func, args, kwargs)
        return func(*args, **(kwargs or {}))
