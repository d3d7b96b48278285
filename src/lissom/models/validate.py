"""What can be wrong with a checkpoint before any weight is loaded; every function collects all problems."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..core import CheckpointError
from .architectures import Architecture, architecture_of, known_types
from .layout import Part, block_parts, outer_parts, prefix_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SHOWN = 12  # problems of one kind that are spelled out


def config_problems(raw: dict[str, Any], where: str) -> list[str]:
    """Unknown architecture and remote code, from config.json as it is."""
    kind = raw.get("model_type")
    if kind in known_types():
        return []
    if raw.get("auto_map"):
        return [
            f"{where}: model_type {kind!r} needs Python code from the checkpoint (auto_map), which lissom never runs. "
            f"Known architectures: {', '.join(known_types())}"
        ]
    if not kind:
        return [f"{where} has no model_type; known: {', '.join(known_types())}"]
    try:
        architecture_of(str(kind))
    except CheckpointError as error:
        return [f"{where}: {error}"]
    return []


def shard_problems(folder: Path) -> tuple[dict[Path, set[str]], list[str]]:
    """The safetensors files of a directory with the names that the index places in each, and what is wrong with them."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        single = folder / "model.safetensors"
        return {f: set() for f in ([single] if single in files else files)}, []
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in placed.items():
            by_file.setdefault(str(file), set()).add(name)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        return {}, [f"{index} is damaged ({type(error).__name__}: {error}); download it again"]
    shards, problems = {}, []
    for file in sorted(by_file):
        path = PurePosixPath(file.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in file:
            problems.append(f"{index} names the shard {file!r}, which leaves the directory: refused")
        elif not (folder / file).is_file():
            problems.append(f"missing shard {file} ({len(by_file[file])} tensors) in {folder}; download it again")
        else:
            shards[folder / file] = by_file[file]
    return shards, problems


def pickle_problem(folder: Path) -> str:
    """Why a directory without safetensors is refused."""
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if not pickles:
        return f"{folder} has no weights: neither *.safetensors nor {INDEX}"
    return (
        f"{folder} holds only pickle weights ({', '.join(pickles[:3])}), which can run code when opened: refused. "
        "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(OUT)"
    )


def tensor_problems(checkpoint: Checkpoint, row: Architecture | None = None) -> list[str]:
    """Missing tensors, wrong shapes, tensors that the architecture row does not know, unsupported options."""
    config = checkpoint.config
    row = row or architecture_of(config.model_type)
    names = set(checkpoint.names())
    prefix = prefix_of(row, names)
    blocks = config.num_hidden_layers
    bare = prefix != row.prefixes[0]
    parts = list(outer_parts(row, config, prefix, bare))
    by_block = [list(block_parts(row, config, prefix, i)) for i in range(blocks)]
    missing, shapes = [], []
    for part in [*parts, *(p for block in by_block for p in block)]:
        if part.name in names:
            shape = tuple(checkpoint.shape(part.name))
            if shape != part.shape:
                shapes.append(f"{part.name} has shape {shape}, the config asks for {part.shape}")
        elif not part.optional:
            missing.append(f"missing tensor {part.name} {part.shape}")
    missing += _uneven_biases(by_block, names)
    known = {p.name for block in by_block for p in block} | {p.name for p in parts}
    inside = prefix + row.layer.split("{}")[0]
    strange = sorted(n for n in names - known if n.startswith(inside) and not ignorable(row, n))
    unknown = [
        f"{n} is not a tensor of a {row.name} of {blocks} blocks: the row or the config does not fit" for n in strange
    ]
    return [line for lines in (missing, shapes, unknown) for line in _shorten(lines)] + _options(row, config)


def ignorable(row: Architecture, name: str) -> bool:
    """Buffers that old files carry and no forward pass reads."""
    return name.endswith(tuple(f".{n}" for n in ("rotary_emb.inv_freq", "position_ids", *row.ignored)))


def _uneven_biases(blocks: list[list[Part]], names: set[str]) -> list[str]:
    out = []
    for parts in zip(*([p for p in block if p.optional] for block in blocks), strict=True):
        absent = [p for p in parts if p.name not in names]
        if 0 < len(absent) < len(parts):
            out += [f"missing tensor {p.name} {p.shape}, which other blocks have" for p in absent]
    return out


def _options(row: Architecture, config: Any) -> list[str]:
    """Config options that change the forward pass and that no row describes."""
    refused = {
        "use_bidirectional_attention": (False, None), "add_cross_attention": (False, None),
        "is_encoder_decoder": (False, None), "scale_attn_weights": (True, None),
    }  # fmt: skip
    if not row.causal:
        refused["is_decoder"] = (False, None)
    return [
        f"config option {key}={getattr(config, key)!r} is not supported for {row.name}"
        for key, allowed in refused.items()
        if getattr(config, key, None) not in allowed
    ]


def _shorten(lines: list[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return lines if rest <= 0 else [*lines[:_SHOWN], f"… and {rest} more like this"]
