"""One artefact in another format: what is stored is written again, nothing is solved or rounded a second time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core import FormatError, OutputError, Solved, grid_of
from ..export import LayerPlan, StoredLayer, codec_named, dtype_of, form_name, open_model
from ..models import Linear, Model
from .artefact import Artefact
from .operating import format_problems
from .sections import Save
from .stream import LayerResult


@torch.no_grad()
def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    dtype: str = "auto",
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write ``source`` (anything that :func:`lissom.export.open_model` opens) into the directory ``out`` in ``format``.

    Codes stay as they are, bit for bit; everything else is in ``dtype``. The result is loaded back and compared. Returns
    {"bytes", "quantized": layers, "exact": whether every linear layer has the same weights, "notes"}. Raises
    :class:`FormatError` with everything that the format cannot hold before anything is written.
    """
    target, codec = Path(out), codec_named(format)
    if target.exists():
        raise OutputError(f"{target} exists; choose another directory or remove it")
    checkpoint = open_model(source)
    model = Model(checkpoint)
    layers = [layer for i in range(model.blocks) for layer in model.linears(i)]
    transposed = model.architecture.transposed
    plans = {layer.name: _plan(layer, checkpoint.layer(layer.name), transposed) for layer in layers}
    problems = [line for plan in plans.values() for line in codec.check(plan)]
    problems += format_problems(model, format, model.operators, lambda layer: _quantized(plans[layer.name]))
    if problems:
        more = f"\n… and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise FormatError(f"{source} cannot be written as {format}:\n" + "\n".join(problems[:8]) + more)
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    kind = str(dtype_of(checkpoint, dtype)).removeprefix("torch.")
    artefact = Artefact(work, model, Save(format, kind))
    artefact.outer()
    changed = []
    for i in range(model.blocks):
        block = model.load_block(i)
        artefact.settle(block)
        for layer in block.linears:
            stored, plan = checkpoint.layer(layer.name), plans[layer.name]
            keep = _quantized(plan) or (format == "packed" and plan.pattern != "dense")
            _, written = artefact.layer(block, layer, _result(layer, stored, plan) if keep else None, None)
            if not torch.equal(written, stored.weight):
                changed.append(layer.name)
        artefact.part(i, block)()
    size = sum(artefact.close().values())
    again = open_model(work)
    for layer in layers:
        if layer.name not in changed and not torch.equal(
            again.layer(layer.name).weight, checkpoint.layer(layer.name).weight
        ):
            raise FormatError(f"{layer.name}: the weights loaded back differ; {target} is not kept")
    notes = [f"{len(changed)} layers were rounded to {kind}: {changed[0]}, …"] if changed else []
    outer = [n for n in (model.embed_name, model.head_name) if n and checkpoint.layer(n.removesuffix(".weight")).codes]
    if outer:
        notes.append(f"{outer[0]} keeps no codes in this format and was rounded to {kind}")
    for line in notes:
        if note:
            note(line)
    os.replace(work, target)
    quantized = sum(_quantized(plan) for plan in plans.values())
    return {"bytes": size, "quantized": quantized, "exact": not changed, "notes": notes}


def _quantized(plan: LayerPlan) -> bool:
    return plan.bits is not None or plan.form is not None


def _plan(layer: Linear, stored: StoredLayer, transposed: bool) -> LayerPlan:
    codes = stored.codes
    bits, group = grid_of(codes) or (None, None)
    pattern = stored.pattern
    if pattern == "dense" and codes is None and stored.form is None and bool((stored.weight == 0).any()):
        pattern = "unstructured"
    return LayerPlan(
        layer.name, (layer.rows, layer.columns), pattern, bits, group, codes is not None and codes.symmetric, transposed,
        form=None if stored.form is None else form_name(stored.form),
    )  # fmt: skip


def _result(layer: Linear, stored: StoredLayer, plan: LayerPlan) -> LayerResult:
    weight = stored.weight
    solved = Solved(weight, stored.codes, stored.mask, torch.zeros(layer.rows), {}, stored.form)
    return LayerResult(layer, solved, plan.pattern, 0.0, 0.0)
