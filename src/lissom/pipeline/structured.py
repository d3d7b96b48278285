"""Structured steps: before anything else, the checkpoint becomes a smaller ordinary one; the rest of the run starts there.

Every block keeps the same number of heads and neurons, because configs of transformers hold one number for all blocks:
the plan says which. Blocks stream by; a block sees what the smaller blocks before it give.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import RecipeError, Stats, UnitProblem, Units
from ..export import ArtefactWriter, open_model
from ..export.writer import write_json
from ..methods.structured import bias_of_removed, influence
from ..models import Block, Linear, Model
from ..models.layout import Sizes, block_parts
from ..models.units import KINDS, refusal, smaller_block, smaller_config, units_of
from . import gradients
from .data import embed
from .permutation import pattern_of, permute_blocks
from .recipe import REWRITES, Recipe, Step
from .stream import stream_block

Tick = Callable[[str, int, int], None]
_MULTIPLE = 32  # neurons that remain are a multiple of this, so that groups of quantization and SIMD lanes fit


def structured_steps(recipe: Recipe) -> list[Step]:
    return [s for s in recipe.steps if s.method.kind in REWRITES]


@dataclass(frozen=True)
class Shape:
    """What remains in every block: KV ``heads`` (with their query heads), ``neurons``; and how many ``blocks``."""

    heads: int
    neurons: int
    blocks: int


def shape_after(model: Model, step: Step) -> Shape:
    """The shape that a step leaves; raises :class:`RecipeError` where no legal one is near, or transformers has none."""
    s = Sizes.of(model.architecture, model.config)
    full = {"heads": s.kv_heads, "neurons": s.inner, "blocks": model.blocks}
    left = dict(full)
    problems = []
    for kind, all_of in full.items():
        share = getattr(step.config, f"keep_{kind}", 1.0)
        if not 0 < share <= 1:
            problems.append(f"{step.name}: keep_{kind} must be above 0 and at most 1, not {share:g}")
            continue
        multiple = _MULTIPLE if kind == "neurons" and all_of % _MULTIPLE == 0 and all_of >= 4 * _MULTIPLE else 1
        count = round(share * all_of / multiple) * multiple
        if count < 1:
            problems.append(
                f"{step.name}: keep_{kind} {share:g} of {all_of} leaves none; the least is {multiple / all_of:.3g}"
            )
        elif count < all_of and kind in KINDS:
            reason = refusal(model.architecture, model.config, kind)
            if reason:
                problems.append(f"{step.name}: {kind} cannot be removed from {reason}; set keep_{kind}=1")
        left[kind] = count
    if left == full and not problems:
        problems.append(f"{step.name}: nothing is removed; set keep_heads, keep_neurons or keep_blocks below 1")
    if problems:
        raise RecipeError(problems)
    return Shape(**left)


class Planned:
    """A checkpoint that does not exist yet: config, names and shapes of what a structured step will make of ``model``."""

    format = "planned"

    def __init__(self, model: Model, step: Step):
        shape = shape_after(model, step)
        row, old = model.architecture, model.checkpoint
        self.source, self._old = old.source, old
        self.config = smaller_config(row, model.config, shape.heads, shape.neurons, range(shape.blocks))
        present = set(old.names())
        self._shapes = {n: tuple(old.shape(n)) for n in model.outer_names()}
        for i in range(shape.blocks):
            for part in block_parts(row, self.config, model.prefix, i):
                if part.name in present:
                    self._shapes[part.name] = part.shape

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._old.dtype(name)

    @property
    def bytes(self) -> int:
        return sum(torch.Size(s).numel() * self.dtype(n).itemsize for n, s in self._shapes.items())

    def problems(self) -> list[str]:
        return []

    def tokenizer(self) -> Any:
        return self._old.tokenizer()

    def fingerprint(self) -> str:
        return self._old.fingerprint()

    def copy_assets(self, out: Path) -> None:
        self._old.copy_assets(out)

    def tensor(self, name: str) -> Tensor:
        raise ValueError(f"{name} is only planned: its weights do not exist yet")


def planned_model(model: Model, recipe: Recipe) -> Model:
    """``model`` as the recipe's structured steps will leave it, without weights; itself when there are none."""
    for step in structured_steps(recipe):
        if step.method.kind == "permutation":
            pattern_of(model, step)
        else:
            model = Model(Planned(model, step))
    return model


def smaller_model(
    model: Model, recipe: Recipe, ids: Tensor, folder: Path, dtype: torch.dtype, tick: Tick | None = None
) -> tuple[Model, list[dict[str, Any]]]:
    """What the structured steps make of ``model``, in ``folder``, and what they kept; itself when there are none.

    A step that is complete on disk is not done again; one that was killed starts again.
    """
    record = []
    for number, step in enumerate(structured_steps(recipe)):
        place = folder / str(number)
        done = place / "kept.json"
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            write_json(done, rewrite(model, step, ids, place, dtype, tick))
        record.append(json.loads(done.read_text(encoding="utf-8")))
        model = Model(open_model(place))
    return model, record


@dataclass(frozen=True)
class _View:
    """What :meth:`ArtefactWriter.finish` reads of a checkpoint, with another config."""

    config: Any
    copy_assets: Callable[[Path], None]


@torch.no_grad()
def rewrite(
    model: Model, step: Step, ids: Tensor, folder: Path, dtype: torch.dtype, tick: Tick | None = None
) -> dict[str, Any]:
    """Write the smaller model into ``folder``; ``ids`` (samples, tokens). Returns what was kept, for the manifest."""
    writer = ArtefactWriter(folder)
    hidden = embed(model, ids)
    config, record = model.config, {"step": step.name, "heads": {}, "neurons": {}}
    if step.method.kind == "permutation":

        def write(i: int, block: Block) -> None:
            writer.add(f"block-{i:05d}", {k: v.to(dtype).contiguous() for k, v in block.tensors().items()})

        record |= permute_blocks(model, step, hidden, write, tick)
    elif step.method.kind == "blocks":
        keep, influences = _choose_blocks(model, step, hidden)
        record |= {"blocks": keep, "influence": influences}
        for j, i in enumerate(keep):
            writer.add(f"block-{j:05d}", _renamed(model, model.load_block(i), i, j, dtype))
        config = smaller_config(model.architecture, config, None, None, keep)
    else:
        shape = shape_after(model, step)
        config = smaller_config(model.architecture, config, shape.heads, shape.neurons, range(model.blocks))
        biased = _bias_switches(model, step)
        for switch in biased:
            setattr(config, switch, True)
        if "gradients" in step.method.needs:
            gradients.gather(model, ids, folder, {"samples"}, tick)
        for i in range(model.blocks):
            block = model.load_block(i)
            chosen, hidden, biases = _choose_units(block, step, shape, hidden, folder)
            for kind, (_, kept) in chosen.items():
                record[kind][str(i)] = kept.tolist()
            block.parameters = _with_biases(smaller_block(block, chosen), block, biases, biased)
            writer.add(f"block-{i:05d}", {k: v.to(dtype).contiguous() for k, v in block.tensors().items()})
            if tick:
                tick(step.name, i + 1, model.blocks)
        for file in folder.glob("gradients-*.safetensors"):
            file.unlink()
    outer = {n: model.checkpoint.tensor(n) for n in model.outer_names()}
    writer.add("outer", {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in outer.items()})
    writer.finish(_View(config, model.checkpoint.copy_assets), dtype)  # type: ignore[arg-type]
    return record


def _choose_blocks(model: Model, step: Step, hidden: list[Tensor]) -> tuple[list[int], list[float]]:
    influences = []
    for i in range(model.blocks):
        block = model.load_block(i)
        after = [block.forward(h) for h in hidden]
        influences.append(influence(torch.cat(hidden), torch.cat(after)))
        hidden = after
    return step.method.run(influences, step.config), influences


def _choose_units(
    block: Block, step: Step, shape: Shape, hidden: list[Tensor], folder: Path
) -> tuple[dict[str, tuple[Units, Tensor]], list[Tensor], dict[str, Tensor]]:
    """Units that stay, {kind: (units, indices)}; the block's outputs without the others; biases in their place."""
    samples = {n: e["samples"] for n, e in gradients.block_extras(folder, block.number).items() if "samples" in e}
    wanted = {"heads": shape.heads, "neurons": shape.neurons}
    units = {k: units_of(block.row, block.config, block.linears, k) for k in KINDS}
    chosen: dict[str, tuple[Units, Tensor]] = {}
    biases: dict[str, Tensor] = {}

    def visit(stage: tuple[Linear, ...], stats: Stats) -> None:
        for kind, group in units.items():
            if stage[0].name not in group.columns or wanted[kind] >= group.count:
                continue
            weights = {la.name: block.weight(la.name) for la in block.linears}
            problem = UnitProblem(group, weights, {stage[0].name: stats}, samples, block.number)
            keep = _best(step.method.run(problem, step.config), wanted[kind])
            chosen[kind] = (group, keep)
            _close(block, group, keep)
            if getattr(step.config, "bias", False) and _can_hold(block, stage[0].name):
                for name, value in bias_of_removed(problem, keep).items():
                    old = block.bias(name)
                    biases[name] = value if old is None else old + value
                    block.parameters[f"{name}.bias"] = biases[name]

    return chosen, stream_block(block, hidden, visit, gram=False), biases


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, rising; of equals the first ones stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _close(block: Block, units: Units, keep: Tensor) -> None:
    """Cut the units outside of ``keep`` off from the layer that reads them: the block then gives what the sliced one will."""
    gone = torch.ones(units.count, dtype=torch.bool)
    gone[keep] = False
    for name, index in units.columns.items():
        block.set_weight(name, block.weight(name).index_fill(1, index[gone].flatten(), 0.0))


def _can_hold(block: Block, name: str) -> bool:
    return block.bias(name) is not None or bool(block.row.branch_biases)


def _bias_switches(model: Model, step: Step) -> tuple[str, ...]:
    """Config switches that must be on for the biases that the step makes."""
    if not getattr(step.config, "bias", False):
        return ()
    return model.architecture.branch_biases


def _with_biases(
    parameters: dict[str, Tensor], block: Block, biases: dict[str, Tensor], switches: Sequence[str]
) -> dict[str, Tensor]:
    """Where the config's switches now ask for biases, every layer gets one; zero unless ``biases`` has it."""
    out = dict(parameters) | {f"{n}.bias": b for n, b in biases.items()}
    if switches:
        for layer in block.linears:
            out.setdefault(f"{layer.name}.bias", torch.zeros(len(out[f"{layer.name}.weight"])))
    return out


def _renamed(model: Model, block: Block, old: int, new: int, dtype: torch.dtype) -> dict[str, Tensor]:
    at, to = (model.prefix + model.architecture.layer.format(i) for i in (old, new))
    return {to + n.removeprefix(at): t.to(dtype).contiguous() for n, t in block.tensors().items()}
