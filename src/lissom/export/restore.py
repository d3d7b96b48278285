"""Back to dense: as a directory that every tool loads, or as a transformers model in memory."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError, FormatError, OutputError, RecipeError
from ..models import Checkpoint
from ..models.operators import KEY, read_operators
from .layout import DTYPES
from .opened import OpenedCheckpoint, open_model
from .writer import ArtefactWriter

_PART_BYTES = 256 << 20  # decoded fp32 bytes that are in memory at a time


def unpack(source: str | Path | Checkpoint, out: str | Path, dtype: str | torch.dtype = "auto") -> Path:
    """Write ``source`` (any format that :func:`open_model` opens) as a dense Hugging Face directory, part by part.

    ``dtype``: float32 keeps quantized weights bit for bit, float16 and bfloat16 round them once; "auto" is the dtype
    in the source's config (float16 for GGUF). ``out`` appears only when complete. Raises :class:`OutputError` when
    ``out`` exists or the disk is full.
    """
    checkpoint, target = open_model(source), Path(out)
    kind = dtype_of(checkpoint, dtype)
    if target.exists():
        raise OutputError(f"{target} exists; choose another directory or remove it")
    _refuse_problems(checkpoint)
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    writer = ArtefactWriter(work)
    pending: dict[str, Tensor] = {}
    size, number = 0, 0
    for name in checkpoint.names():
        weight = 4 * math.prod(checkpoint.shape(name))
        if pending and size + weight > _PART_BYTES:
            writer.add(f"{number:05d}", pending)
            pending, size, number = {}, 0, number + 1
        value = checkpoint.tensor(name)
        pending[name] = value.to(kind) if value.is_floating_point() else value
        size += weight
    writer.add(f"{number:05d}", pending)
    writer.finish(checkpoint, kind)
    os.replace(work, target)
    return target


def load(source: str | Path | Checkpoint, dtype: str | torch.dtype = "auto") -> Any:
    """A transformers model with the decoded weights, for anything that :func:`open_model` opens.

    The peak is the dense model in ``dtype`` plus one matrix. Raises :class:`CheckpointError` or :class:`FormatError`
    when the files are incomplete or damaged.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    checkpoint = open_model(source)
    kind = dtype_of(checkpoint, dtype)
    _refuse_problems(checkpoint)
    if read_operators(getattr(checkpoint.config, KEY, None)).turns:
        raise FormatError(
            f"{checkpoint.source} needs a rotation at run time (quarot with online: true), which transformers does not do; "
            "evaluate it with lissom, or compress with online=false"
        )
    names = checkpoint.names()
    state = {}
    for name in names:
        value = checkpoint.tensor(name)
        state[name] = value.to(kind) if value.is_floating_point() else value
    config = checkpoint.config
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    return known[type(config)].from_pretrained(None, config=config, state_dict=state, dtype=kind).eval()


def _refuse_problems(checkpoint: OpenedCheckpoint) -> None:
    if problems := checkpoint.problems():
        raise CheckpointError(f"{checkpoint.source} cannot be used:\n" + "\n".join(problems))


def dtype_of(checkpoint: OpenedCheckpoint, dtype: str | torch.dtype) -> torch.dtype:
    """``auto``: the dtype of the checkpoint's config, float16 for GGUF. Raises :class:`RecipeError` for unknown names."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        stated: Any = getattr(checkpoint.config, "dtype", None)
        return stated if checkpoint.format != "gguf" and stated in DTYPES.values() else torch.float16
    if dtype not in DTYPES:
        raise RecipeError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]
