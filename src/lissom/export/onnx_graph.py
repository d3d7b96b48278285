"""A thin layer over onnx.helper: nodes that name themselves, and linear layers from lissom's codes as QDQ nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import Codes, FormatError

OPSET, IR = 21, 10  # the first with 4-bit integers and blocked DequantizeLinear


def library() -> Any:
    """The ``onnx`` package; :class:`FormatError` says how to get it."""
    try:
        import onnx
    except ImportError as error:
        raise FormatError("ONNX export needs the package onnx: pip install 'lissom[onnx]'") from error
    return onnx


class Graph:
    """Collects nodes; every method returns the name of a value."""

    def __init__(self) -> None:
        self.onnx = library()
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._scalars: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """One node with one output."""
        name = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """A small constant, kept once."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._scalars:
            self._scalars[key] = self.array(f"constant_{len(self._scalars)}", array)
        return self._scalars[key]

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def array(self, name: str, value: np.ndarray | Tensor) -> str:
        array = value.contiguous().numpy() if isinstance(value, Tensor) else value
        self.constants[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, name: str, value: Tensor, bits: int, signed: bool) -> str:
        """An int4, uint4, int8 or uint8 tensor, the smallest that holds ``bits``."""
        proto = self.onnx.TensorProto
        kind = {
            (True, True): proto.INT4, (True, False): proto.UINT4, (False, True): proto.INT8, (False, False): proto.UINT8,
        }[bits <= 4, signed]  # fmt: skip
        array = value.to(torch.int8 if signed else torch.uint8).contiguous().numpy()
        if bits <= 4:
            nibbles = (array.view(np.uint8) & np.uint8(15)).reshape(-1)
            nibbles = np.pad(nibbles, (0, nibbles.size % 2))
            raw = (nibbles[::2] | nibbles[1::2] << np.uint8(4)).astype(np.uint8).tobytes()
        else:
            raw = array.tobytes()
        self.constants[name] = self.onnx.helper.make_tensor(name, kind, array.shape, raw, raw=True)
        return name

    def dequantized(self, name: str, codes: Codes) -> str:
        """The weight (in, out) fp32 as one DequantizeLinear of lissom's codes: ``(code − zero) · scale``, the same numbers."""
        columns = codes.values.shape[1]
        whole = codes.group_size >= columns
        zero = 2 ** (codes.bits - 1) if codes.symmetric else 0
        values = codes.values.T.to(torch.int16) - zero
        scale = codes.scale[:, 0] if whole else codes.scale.T
        inputs = [
            self.integers(f"{name}.codes", values, codes.bits, codes.symmetric),
            self.array(f"{name}.scale", scale.float()),
        ]
        if not codes.symmetric:
            zeros = codes.zero[:, 0] if whole else codes.zero.T
            inputs.append(self.integers(f"{name}.zero", zeros, codes.bits, False))
        where: dict[str, int] = {"axis": 1} if whole else {"axis": 0, "block_size": codes.group_size}
        return self("DequantizeLinear", *inputs, out=f"{name}.weight", **where)

    def rounded(self, x: str, bits: int, scale: float | None) -> str:
        """``lissom.methods.quantize.activations.round_input``: QDQ for a static scale of 8 bits, else arithmetic."""
        half = 2.0 ** (bits - 1)
        if scale is not None and bits == 8:
            where = (self.constant(scale), self.constant(0, np.int8))
            return self("DequantizeLinear", self("QuantizeLinear", x, *where), *where)
        if scale is None:
            top = self("ReduceMax", self("Abs", x), self.ints(-1), keepdims=1)
            live = self("Div", top, self.constant((2.0**bits - 1) / 2))
            empty = self("Equal", live, self.constant(0.0))
            step = self("Where", empty, self.constant(np.finfo(np.float32).eps), live)
        else:
            step = self.constant(scale)
        clipped = self("Clip", self("Div", x, step), self.constant(-half), self.constant(half - 1))
        return self("Mul", self("Round", clipped), step)

    def heads(self, x: str, count: int, size: int) -> str:
        """(batch, tokens, count · size) → (batch, tokens, count, size)."""
        return self("Reshape", x, self.ints(0, 0, count, size))

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], notes: dict[str, str]) -> Any:
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "lissom", list(inputs), list(outputs), list(self.constants.values()))
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="lissom"
        )
        helper.set_model_props(made, notes)
        return made
