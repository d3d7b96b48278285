"""Steps of kind ``training``: the finished model, still in parts, is trained as a whole and its parts are written again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CalibrationError, Codes, Solved
from ..evaluate import fingerprint, load_text, tokenize, windows
from ..export import StoredLayer, open_model
from ..methods.heal.legal import Legal
from ..models import Model
from ..train import (
    Batches,
    Gradual,
    Latent,
    LoRA,
    Network,
    Training,
    cache_teacher,
    hardware,
    held_out_loss,
    loss_against,
    loss_against_cache,
    solved_of,
    train,
)
from .artefact import Artefact, LayerRecord
from .recipe import Recipe, Step
from .stream import LayerResult

Tick = Callable[[str, int, int], None]


def training_steps(recipe: Recipe) -> list[Step]:
    return [s for s in recipe.steps if s.method.kind == "training"]


def teacher_of(dense: Model, step: Step) -> Model:
    """What a step learns from: the checkpoint that it names, else the model before compression. Nothing is loaded."""
    named = getattr(step.config, "teacher", "")
    return Model(open_model(named)) if named else dense


def teacher_problems(dense: Model, student: Model, recipe: Recipe) -> list[str]:
    """Teachers that cannot teach ``student``, the model as structured steps will leave it, and hardware that is not there."""
    out = [
        f"{step.name}: no CUDA device is to be seen; leave device at auto, which takes the processor"
        for step in recipe.steps
        if getattr(step.config, "device", "auto") == "cuda" and not torch.cuda.is_available()
    ]
    for step in training_steps(recipe):
        teacher = teacher_of(dense, step)
        theirs, ours = teacher.config.vocab_size, student.config.vocab_size
        if theirs != ours:
            out.append(
                f"{step.name}: the teacher {teacher.checkpoint.source} has a vocabulary of {theirs}, the student of {ours}: "
                "they must share the tokenizer"
            )
        elif getattr(step.config, "hidden", 0) and teacher.width != student.width:
            out.append(
                f"{step.name}: hidden states of the teacher have {teacher.width} channels, those of the student "
                f"{student.width}, which cannot be compared; set hidden=0"
            )
    return out


@dataclass(frozen=True)
class Healed:
    """``records`` of all layers as written again; ``hidden``: final states of the sample ``ids``; ``history`` for the manifest."""

    records: list[LayerRecord]
    hidden: Tensor
    history: list[dict[str, Any]]


def heal(
    folder: Path,
    model: Model,
    dense: Model,
    artefact: Artefact,
    records: Sequence[LayerRecord],
    step: Step,
    data: str,
    ids: Tensor,
    tick: Tick | None = None,
) -> Healed:
    """Train the model whose parts ``artefact`` holds against ``dense``; ``data``: text, where the step names none.
    The solved layers are trained; every layer where ``dense`` is larger than ``model`` (structured steps came before), or
    where nothing was solved because the source was compressed before: then its zeros stay where a layer has many of them.

    The state lives in ``folder``: a killed training goes on from there, and one killed while the parts are written again
    writes them all once more. ``ids`` (1, tokens): a sample to compare the reloaded artefact with.
    """
    config = step.config
    tokens = tokenize(model.checkpoint.tokenizer(), load_text(config.data or data))
    apart = config.held_out * config.length
    if len(tokens) < apart + config.length + 1:
        raise CalibrationError(
            f"{step.name}: the text has {len(tokens)} tokens, {config.held_out} held-out windows and one batch need "
            f"{apart + config.length + 1} of length {config.length}; use a longer text (data), or fewer and shorter windows"
        )
    judged = windows(tokens[-apart:], config.held_out, config.length)
    batches = Batches(tokens[:-apart], config.length, config.batch, config.seed)
    student, before = _student(
        model, artefact, records, config, everything=_shrunk(dense, model) or not _solves(records)
    )
    device, precision = hardware(config, model.device)
    student.to(device)
    teacher = teacher_of(dense, step)
    if config.cache:
        loss = _cached_loss(teacher, student, batches, config, folder / "teacher")
    else:
        loss = loss_against(
            student,
            Network(teacher).to(device),
            config.objective(),
            lambda *outputs: step.method.run(*outputs[:3], config),
        )
    settings = Training(
        steps=config.steps, minutes=config.minutes, accumulate=config.accumulate, learning_rate=config.learning_rate,
        warmup=config.warmup, rewind=config.rewind, ema=config.ema, patience=config.patience, evaluate_every=config.evaluate_every,
        precision=precision, save_every=4 * config.evaluate_every,
        keep_best=config.gradual is None,
    )  # fmt: skip
    grow = _gradual(student, records, config)
    state = train(
        student.leaves() | (grow.leaves() if grow else {}), loss, batches, settings, folder=folder,
        before_step=grow.step if grow else None,
        tensorboard=Path(config.tensorboard) if config.tensorboard else None,
        held_out=lambda: held_out_loss(student, judged),
        identity=json.dumps(
            [asdict(config), fingerprint(tokens), _fingerprint(before), teacher.checkpoint.fingerprint()]
        ),
        tick=lambda done, total, row: tick("heal", done, total) if tick else None,
    )  # fmt: skip
    new = _write(student.to("cpu"), artefact, records, before)
    with torch.no_grad():
        hidden = student.model.embed(ids, outer=student.outer)
        for block in student.blocks:
            hidden = block.forward(hidden)
    history = [{k: None if v != v else v for k, v in row.items()} for row in state.history]
    return Healed(new, hidden, history)


def _cached_loss(
    dense: Model, student: Network, batches: Batches, config: Any, folder: Path
) -> Callable[[Tensor], Tensor]:
    """The same, from the largest log-probabilities of the dense model, written once before the first step."""
    if config.cache >= dense.config.vocab_size:
        raise CalibrationError(
            f"cache must be less than the vocabulary of {dense.config.vocab_size}, not {config.cache}"
        )
    cache_teacher(Network(dense).to(student.device), batches, range(config.steps), config.cache, folder)
    dense.release()
    return loss_against_cache(student, folder, config.objective())


def _shrunk(dense: Model, model: Model) -> bool:
    return dense.blocks != model.blocks or dense.linears(0) != model.linears(0)


def _solves(records: Sequence[LayerRecord]) -> bool:
    return any(r.error is not None for r in records)


def _student(
    model: Model, artefact: Artefact, records: Sequence[LayerRecord], config: Any, everything: bool
) -> tuple[Network, dict[str, StoredLayer]]:
    """The model as its parts decode, with a form for everything that is trained, and the layers as they are stored."""
    stored = {n: layer for i in range(model.blocks) for n, layer in artefact.read(i).items()}
    by_name = {r.name: r for r in records}
    student = Network(model, recompute=config.recompute)
    student.outer |= {k: v for k, v in artefact.outer().items() if k in student.outer}
    model.release()
    for block in student.blocks:
        linear = {layer.name for layer in block.linears}
        artefact.settle(block)
        for name in linear:
            if name not in stored:
                block.set_weight(name, block.weight(name).to(artefact.dtype).float())
                if not everything:
                    continue
            layer = stored.get(name) or StoredLayer(None, _zeros_of(block.weight(name)), "dense", block.weight(name))
            block.set_weight(name, layer.weight)
            mask = layer.mask if by_name[name].sparsity > 0 else None
            legal = Legal(mask, layer.codes)
            rank = min(config.rank, *layer.weight.shape)
            seed = config.seed + len(student.forms)
            student.forms[f"{name}.weight"] = (
                LoRA(layer.weight, rank, 2.0 * rank, legal, seed) if rank else Latent(layer.weight.clone(), legal)
            )
        if config.norms:
            rest = [k for k, v in block.parameters.items() if v.dim() == 1 and v.is_floating_point()]
            student.forms |= {k: Latent(block.parameters[k].clone()) for k in rest}
    return student, stored


def _gradual(student: Network, records: Sequence[LayerRecord], config: Any) -> Gradual | None:
    if config.gradual is None:
        return None
    free = {f"{r.name}.weight" for r in records if ":" not in r.pattern}
    return Gradual(
        {n: f for n, f in student.forms.items() if n in free and isinstance(f, Latent)},
        config.gradual, config.updates, config.rise,
    )  # fmt: skip


_PRUNED = 0.05  # a dense layer with more zeros than this was pruned, and its zeros stay


def _zeros_of(weight: Tensor) -> Tensor | None:
    mask = weight != 0
    return None if float((~mask).float().mean()) <= _PRUNED else mask


def _write(
    student: Network, artefact: Artefact, records: Sequence[LayerRecord], before: Mapping[str, StoredLayer]
) -> list[LayerRecord]:
    """Encode every block again with what was trained; what the solvers found out about a layer stays in its record."""
    old = {r.name: r for r in records}
    forms = dict(student.forms)
    student.settle()
    out: list[LayerRecord] = []
    for i, block in enumerate(student.blocks):
        artefact.settle(block)
        for layer in block.linears:
            record, result = old[layer.name], None
            form = forms.get(f"{layer.name}.weight")
            if isinstance(form, Latent | LoRA) and layer.name in before:
                solved = solved_of(form, _solved(before[layer.name], form.legal.mask))
                pattern = "unstructured" if record.pattern == "dense" and solved.mask is not None else record.pattern
                result = LayerResult(layer, solved, pattern, 0.0, 0.0)
            made, stored = artefact.layer(block, layer, result, record.cluster)
            block.set_weight(layer.name, stored)
            new = made()
            out.append(
                replace(record, pattern=new.pattern, sparsity=new.sparsity, bytes=new.bytes, checksum=new.checksum)
            )
        artefact.part(i, block)()
    return out


def _solved(layer: StoredLayer, mask: Tensor | None) -> Solved:
    codes: Codes | None = layer.codes
    return Solved(layer.weight, codes, mask, torch.zeros(len(layer.weight)))


def _fingerprint(layers: Mapping[str, StoredLayer]) -> str:
    """Of what a training may not change: masks and grids."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        layer = layers[name]
        digest.update(name.encode())
        if layer.codes is not None:
            digest.update(layer.codes.scale.numpy().tobytes())
        if layer.mask is not None:
            digest.update(layer.mask.numpy().tobytes())
    return digest.hexdigest()[:16]
