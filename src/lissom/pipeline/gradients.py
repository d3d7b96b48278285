"""Gradients of the loss without the whole model in memory: blocks are run again, one at a time, from the last to the first.

    forward, saving every block's input to disk          h_{i+1} = block_i(h_i)
    ∂L/∂h after the last block from the head, then for i = last … first:
        run block i again from its saved input with gradients, push ∂L/∂h_{i+1} through it

Memory: one block, its gradients, and one sample's graph. What is kept of a layer (``WANTED``) goes to one file per block.
L is the mean next-token loss of one sample; all statistics run over samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from ..core import HOST, RecipeError, add_gram, mirrored, moved, on
from ..models import Block, Model
from .recipe import Recipe

Tick = Callable[[str, int, int], None]
OUTPUT_GRAM = "output_gram"  # (out, out), E[g gᵀ] of the gradients g at a layer's outputs
OUTPUT_BLOCKS = "output_blocks"  # (out, block), the same within blocks of neighbouring outputs
BLOCK = 2048  # outputs at most: 8 KiB an output on disk, where a wide layer's whole matrix would be a gigabyte
# method → what it reads from ``Problem.extras``, or of a ``UnitProblem``
WANTED = {
    "gblm": ("gradient", "gradient_l1"),
    "obd": ("fisher",),
    "obs": ("samples",),
    "llm-surgeon": (OUTPUT_GRAM,),
    "llm-pruner": ("samples",),
    "head-importance": ("samples",),
    "surgeon-units": (OUTPUT_GRAM,),
    "yaqa": (OUTPUT_BLOCKS,),
}
DO_WITHOUT = {"yaqa"}  # methods that run on a model without a head too, on nothing of these
_OF_WEIGHTS = {"gradient", "gradient_l1", "fisher", "samples"}
TOKEN_WEIGHT = "token_weight"  # (tokens,), of mean 1: (g · g)^exponent of the gradients g at a layer's outputs
OUTPUT_POWER = "output_power"  # (out,), E[g²] of the gradients g at the outputs: the diagonal of `OUTPUT_GRAM`
_POWER_TOKENS = 4096  # for a mean over tokens
_TOKENS = 256  # of the head's logits at a time


def wanted_extras(recipe: Recipe, head: bool = True) -> list[str]:
    """The extras that the solvers and the statistics of a recipe read, of a model with a ``head`` or without."""
    solvers = [s for s in recipe.steps if s.method.kind == "solver" and (head or s.name not in DO_WITHOUT)]
    read = {e for step in solvers for e in WANTED.get(step.name, ())}
    if head and any(step.constraint.row_fisher for step in recipe.steps):
        read.add(OUTPUT_POWER)
    if head and recipe.calibration.token_fisher:
        read.add(TOKEN_WEIGHT)
    return sorted(read)


def gradient_tokens(recipe: Recipe, tokens: int) -> int:
    """How many of the calibration ``tokens`` the gradients of a recipe are taken on."""
    if any(step.method.kind == "units" and step.name in WANTED for step in recipe.steps):
        return tokens
    extras = wanted_extras(recipe)
    return min(tokens, _POWER_TOKENS) if extras == [OUTPUT_POWER] else tokens if extras else 0


def for_recipe(
    model: Model, ids: Tensor, folder: Path, recipe: Recipe, tick: Tick | None = None
) -> Callable[[int], dict[str, dict[str, Tensor]]]:
    """What a recipe reads of each block, by its number, gathered into ``folder`` where it reads anything.

    The power of outputs is a mean over tokens: a few samples are enough where nothing else is read. Without a head there is
    no loss: rows and tokens count alike.
    """
    extras = wanted_extras(recipe, model.has_head)
    if extras == [OUTPUT_POWER]:
        ids = ids[: max(1, _POWER_TOKENS // ids.shape[1])]
    if extras:
        gather(model, ids, folder, extras, tick, recipe.calibration.token_fisher)
    return lambda i: block_extras(folder, i)


def gather(
    model: Model, ids: Tensor, folder: Path, extras: Collection[str], tick: Tick | None = None, exponent: float = 1.0
) -> None:
    """Write ``gradients-<block>.safetensors`` into ``folder`` for ``ids: (samples, tokens)``; finished files are kept.

    ``exponent``: of the weights of tokens."""
    if not model.has_head:
        raise RecipeError("gradients of the loss need a language-model head, which this model has not")
    done = [_file(folder, i).exists() for i in range(model.blocks)]
    if all(done):
        return
    _forward(model, ids, folder)
    upstream = _loss_gradients(model, ids, folder)
    for i in reversed(range(model.blocks)):
        block = model.load_block(i)
        with on(block.device):
            upstream, kept = _backward(block, _inputs(folder, i), upstream, extras, exponent)
        kept = moved(kept, HOST)
        temporary = folder / "gradients.new"
        save_file({k: v.contiguous() for k, v in kept.items()}, temporary)
        os.replace(temporary, _file(folder, i))
        _inputs_file(folder, i).unlink()
        if tick:
            tick("gradients", model.blocks - i, model.blocks)
    _inputs_file(folder, model.blocks).unlink()


def block_extras(folder: Path, i: int) -> dict[str, dict[str, Tensor]]:
    """Layer name → extra → tensor, of block ``i``; empty when nothing was gathered."""
    out: dict[str, dict[str, Tensor]] = {}
    if _file(folder, i).exists():
        for key, value in load_file(_file(folder, i)).items():
            name, _, extra = key.rpartition("|")
            out.setdefault(name, {})[extra] = value
    return out


def _file(folder: Path, i: int) -> Path:
    return folder / f"gradients-{i:05d}.safetensors"


def _inputs_file(folder: Path, i: int) -> Path:
    return folder / f"inputs-{i:05d}.safetensors"


def _inputs(folder: Path, i: int) -> Tensor:
    return load_file(_inputs_file(folder, i))["h"]


@torch.no_grad()
def _forward(model: Model, ids: Tensor, folder: Path) -> None:
    h = torch.cat([model.embed(row[None]) for row in ids])
    save_file({"h": h}, _inputs_file(folder, 0))
    for i in range(model.blocks):
        block = model.load_block(i)
        h = torch.cat([block.forward(row[None]) for row in h])
        save_file({"h": h}, _inputs_file(folder, i + 1))


@torch.enable_grad()
def _loss_gradients(model: Model, ids: Tensor, folder: Path) -> Tensor:
    """∂L/∂h after the last block, (samples, tokens, width)."""
    h = _inputs(folder, model.blocks)
    out = torch.zeros_like(h)
    predicted = ids.shape[1] - 1
    for sample, row in enumerate(ids):
        for at in range(0, predicted, _TOKENS):
            stop = min(at + _TOKENS, predicted)
            part = h[sample : sample + 1, at:stop].detach().to(model.device).requires_grad_()
            logits = model.head(part)[0]
            next_tokens = row[at + 1 : stop + 1].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits, next_tokens, reduction="sum") / predicted
            out[sample, at:stop] = torch.autograd.grad(loss, part)[0][0]
    return out


def _weights_of_tokens(power: Tensor, exponent: float) -> Tensor:
    """(tokens,) of mean 1, from the sums of squared gradients over the outputs (tokens,)."""
    weights = (power / power.mean().clamp_min(1e-30)) ** exponent
    return weights / weights.mean().clamp_min(1e-30)


@torch.enable_grad()
def _backward(
    block: Block, inputs: Tensor, upstream: Tensor, extras: Collection[str], exponent: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """∂L/∂h before the block, and the extras of its layers under ``name|extra``."""
    names = [layer.name for layer in block.linears]
    differentiated = names if _OF_WEIGHTS & set(extras) else []  # outputs alone cost a third less
    weights = [block.weight(name).requires_grad_() for name in differentiated]
    kept: dict[str, Tensor] = {}
    grams = {
        (layer.name, extra): [torch.zeros(len(at), len(at)) for at in _cut(layer.rows, extra)]
        for layer in block.linears
        for extra in (OUTPUT_GRAM, OUTPUT_BLOCKS)
        if extra in extras
    }
    powers = {layer.name: torch.zeros(layer.rows) for layer in block.linears}

    by_token: dict[str, list[Tensor]] = {}

    def observe(name: str, output: Tensor) -> None:
        def add(g: Tensor) -> None:
            flat = g.detach().flatten(0, -2)
            squares = flat.square()
            powers[name] += squares.sum(0)
            if TOKEN_WEIGHT in extras:
                by_token.setdefault(name, []).append(squares.sum(1))
            for extra in (OUTPUT_GRAM, OUTPUT_BLOCKS):
                for gram, at in zip(grams.get((name, extra), ()), _cut(flat.shape[1], extra), strict=False):
                    add_gram(gram, flat[:, at.start : at.stop])

        output.register_hook(add)

    if {OUTPUT_GRAM, OUTPUT_BLOCKS, OUTPUT_POWER, TOKEN_WEIGHT} & set(extras):
        block.observe = observe
    squares = [torch.zeros_like(w, requires_grad=False) for w in weights]
    sums = [torch.zeros_like(w, requires_grad=False) if "gradient_l1" in extras else None for w in weights]
    samples: list[list[Tensor]] = [[] for _ in weights]
    before = torch.empty_like(inputs)
    for s in range(len(inputs)):
        h = inputs[s : s + 1].detach().requires_grad_()
        gradients = torch.autograd.grad(block.forward(h), [h, *weights], upstream[s : s + 1])
        before[s] = gradients[0][0]
        for total, absolute, single, g in zip(squares, sums, samples, gradients[1:], strict=True):
            total += g.square()
            if absolute is not None:
                absolute += g.abs()
            if "samples" in extras:
                single.append(g)
    for i, name in enumerate(differentiated):
        if "gradient" in extras:
            kept[f"{name}|gradient"] = squares[i].sqrt()
        total = sums[i]
        if total is not None:
            kept[f"{name}|gradient_l1"] = total
        if "fisher" in extras:
            kept[f"{name}|fisher"] = squares[i] / len(inputs)
        if "samples" in extras:
            kept[f"{name}|samples"] = torch.stack(samples[i])
    for name in names:
        if OUTPUT_POWER in extras:
            kept[f"{name}|{OUTPUT_POWER}"] = powers[name] / (len(inputs) * inputs.shape[1])
        if TOKEN_WEIGHT in extras:
            kept[f"{name}|{TOKEN_WEIGHT}"] = _weights_of_tokens(torch.cat(by_token.pop(name)), exponent)
    for (name, extra), parts in grams.items():
        whole = torch.cat([pad(mirrored(g), (0, len(parts[0]) - len(g))) for g in parts])
        kept[f"{name}|{extra}"] = whole / (len(inputs) * inputs.shape[1])
    return before, kept


def _cut(rows: int, extra: str) -> list[range]:
    """The outputs whose Gram matrices are gathered together."""
    width = BLOCK if extra == OUTPUT_BLOCKS else rows
    return [range(at, min(at + width, rows)) for at in range(0, rows, width)]


def gram_numbers(rows: int, extras: Collection[str]) -> int:
    """How many numbers of the gradients' Gram matrices a layer of so many outputs keeps."""
    return (rows**2 if OUTPUT_GRAM in extras else 0) + (rows * min(rows, BLOCK) if OUTPUT_BLOCKS in extras else 0)
