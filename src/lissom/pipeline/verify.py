"""Load the artefact back from disk and compare it with what the run made, before OUT appears."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..core import FormatError
from ..evaluate import forward
from ..export import codec_named, open_model
from ..models import Model, Operators

_AT_ONCE = 4  # blocks that are loaded back together, at most
_TOKENS = 128  # of the first calibration sample, for the comparison of logits
_TOLERANCE = 2e-3  # of the largest logit: different kernels add in different orders
# a difference in the last bit may move a rounded activation to the next code, and then everything after it
_ROUNDED_TOLERANCE = 5e-2
_HALF_TOLERANCE = 5e-2  # eight bits of mantissa in every weight and activation


def checksum(weight: Tensor) -> int:
    """CRC-32 of fp32 weights as they decode."""
    return zlib.crc32(weight.float().cpu().contiguous().numpy().data)


def at_once(model: Model, free: int) -> int:
    """Blocks that are loaded back together, one a thread, in a quarter of the ``free`` bytes; one where that is too little."""
    largest = max(4 * sum(layer.rows * layer.columns for layer in model.linears(i)) for i in range(model.blocks))
    return max(1, min(_AT_ONCE, torch.get_num_threads(), free // (4 * largest)))


@torch.no_grad()
def verify(
    folder: Path, manifest: Mapping[str, Any], ids: Tensor, hidden: Tensor, note: Callable[[str], None] | None = None
) -> dict[str, str]:
    """What was compared and how far apart it was; raises :class:`FormatError` when the artefact is not what was made.

    ``ids: (1, tokens)`` one calibration sample, ``hidden: (1, tokens, width)`` its final hidden states in the run.
    """
    found: dict[str, str] = {}
    model = Model(open_model(folder))
    wanted = {row["name"]: row["checksum"] for row in manifest["layers"]}

    def other(i: int) -> str | None:
        """A layer of block ``i`` that is not what was solved."""
        block = model.load_block(i)
        return next((n.name for n in model.linears(i) if checksum(block.weight(n.name)) != wanted[n.name]), None)

    with ThreadPoolExecutor(at_once(model, psutil.virtual_memory().available)) as pool:
        wrong = next(filter(None, pool.map(other, range(model.blocks))), None)
    if wrong:
        raise FormatError(
            f"{wrong}: the weights loaded back from {folder} differ from those solved; the artefact is not kept"
        )
    found["layers"] = f"{len(wanted)} of {len(wanted)} decode bit for bit to the solved weights"
    ids = ids[:, :_TOKENS]
    again = forward(model, ids).hidden[0]
    gap = _gap(again, hidden[:, : ids.shape[1]])
    if gap > (_ROUNDED_TOLERANCE if model.operators else _TOLERANCE):
        raise FormatError(
            f"{folder}: the reloaded model's hidden states differ from the run's by {gap:.2e} of their size"
        )
    found["forward"] = f"hidden states of {ids.shape[1]} tokens agree to {gap:.1e}"
    reader = codec_named(manifest["recipe"]["save"]["format"]).reader
    if reader and importlib.util.find_spec(reader):
        found["transformers"] = _transformers(folder, model, ids, again)
    elif reader:
        found["transformers"] = f"not tried: it loads this format by {reader}, which is not installed"
    if note:
        for what, result in found.items():
            note(f"loaded back, {what}: {result}")
    return found


def _transformers(folder: Path, model: Model, ids: Tensor, hidden: Tensor) -> str:
    """Compare logits with ``AutoModelForCausalLM.from_pretrained`` when the dense model fits into memory twice."""
    needed, free = 2 * 4 * model.parameters_count, psutil.virtual_memory().available
    if not model.has_head:
        return "not tried: the model has no language-model head"
    if needed > free:
        return f"not tried: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    from transformers import AutoModelForCausalLM

    ours = model.head(hidden)  # before the other model is there: the head is a large part of a small one
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    half = _unpacked_in_half(quantization or {})
    kind = torch.bfloat16 if half else torch.float32 if quantization else "auto"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    if not quantization:
        theirs = _widened(theirs)
    beside, allowed = (", in bfloat16", _HALF_TOLERANCE) if half else ("", _TOLERANCE)
    if model.operators and getattr(theirs, "hf_quantizer", None) is None:
        ours = _without(model, Operators(), ids)
        beside = ", both without the run-time operators, which it does not know"
    elif model.operators:
        allowed, beside = _ROUNDED_TOLERANCE, ", both with rounded activations or cache"
        if model.operators.cache and not cache_is_rounded(theirs):
            ours = _without(model, replace(model.operators, cache=None), ids)
            beside = (
                ", both without the rounded cache: this transformers and compressed-tensors do not round it together"
            )
    gap = _gap(theirs(ids).logits, ours)
    if gap > allowed:
        raise FormatError(f"{folder}: transformers' logits differ from ours by {gap:.2e} of their size")
    return f"AutoModelForCausalLM.from_pretrained gives the same logits to {gap:.1e}{beside}"


def _widened(model: torch.nn.Module) -> torch.nn.Module:
    """Computes in fp32 and stays as stored: a block's weights are widened while it runs, so that the check of a
    checkpoint of 16 bits takes half the memory that loading it in fp32 would."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    outer = [part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [block for part in outer for block in part]
    inside = {id(p) for block in blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.float()
    stored: dict[torch.nn.Parameter, Tensor] = {}

    def widen(block: torch.nn.Module, _: Any) -> None:
        for parameter in block.parameters():
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def narrow(block: torch.nn.Module, *_: Any) -> None:
        for parameter in block.parameters():
            parameter.data = stored.pop(parameter)

    for block in blocks:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)
    return model


def _unpacked_in_half(quantization: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors gives the weights back in bfloat16 whatever the model's dtype: it does for FP4."""
    return any("fp4" in str(group.get("format")) for group in quantization.get("config_groups", {}).values())


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))


def _without(model: Model, operators: Operators, ids: Tensor) -> Tensor:
    """Logits of the model with only ``operators``."""
    bare = copy.copy(model)
    bare.operators = operators
    return bare.head(forward(bare, ids).hidden[0])


def cache_is_rounded(theirs: Any) -> bool:
    """Whether compressed-tensors' hook reaches the cache of a transformers model: it passes its own by the name
    ``past_key_values``, which transformers 5.24 took out of the signatures of attention."""
    attention = [m for m in theirs.modules() if type(m).__name__.endswith("Attention")]
    names = ("past_key_values", "past_key_value")
    return all(any(n in inspect.signature(m.forward).parameters for n in names) for m in attention)
