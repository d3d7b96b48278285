"""Structured steps that train: gates, or projections of units, on the whole model in memory; then the smaller one is cut out.

What comes back is the trained model with its gates multiplied into the weights, and a score for every unit. A killed
training goes on from its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import HOST, CalibrationError
from ..evaluate import fingerprint, load_text, tokenize, windows
from ..methods.heal.objective import Objective, compare
from ..methods.structured import factor
from ..models import Model
from ..models.units import units_of
from ..train import (
    Batches,
    Form,
    Gates,
    Latent,
    LoRA,
    Mixture,
    Network,
    Training,
    hardware,
    held_out_loss,
    lagrangian,
    reweighted,
    train,
)
from . import gradients
from .recipe import Step

Tick = Callable[[str, int, int], None]
Hook = Callable[[int, float], None]


@dataclass(frozen=True)
class Trained:
    """``network`` without forms; ``scores``: kind → (blocks, units), (blocks,) or (width,); ``record`` for the manifest."""

    network: Network
    scores: dict[str, Tensor]
    record: dict[str, Any]


@torch.no_grad()
def train_units(
    model: Model, step: Step, keep: Mapping[str, int], ids: Tensor, folder: Path, data: str, tick: Tick | None
) -> Trained:
    """Train ``model`` with gates or projections so that it can do with ``keep`` (kind → units that remain)."""
    texts = _Texts(model, step.config, data)
    student = Network(model)
    linear = [(block, layer) for block in student.blocks for layer in block.linears]
    for number, (block, layer) in enumerate(linear):
        form = _form(block.weight(layer.name), step.config, number)
        if form is not None:
            student.forms[f"{layer.name}.weight"] = form
    if step.method.kind == "gates":
        return _with_gates(model, student, step, keep, texts, folder, tick)
    return _with_projections(model, student, step, keep, texts, ids, folder, tick)


def _form(weight: Tensor, config: Any, number: int) -> Form | None:
    if config.weights == "frozen":
        return None
    if config.weights == "all":
        return Latent(weight.clone())
    rank = min(config.rank, *weight.shape)
    return LoRA(weight, rank, 2.0 * rank, seed=config.seed + number)


class _Texts:
    """What a step trains on and is judged by: the text of ``data``, or domains of their own; a prompt before every window."""

    def __init__(self, model: Model, config: Any, data: str):
        tokenizer = model.checkpoint.tokenizer()
        self.domains: tuple[str, ...] = getattr(config, "domains", ())
        self.prompt = tokenize(tokenizer, config.prompt) if getattr(config, "prompt", "") else torch.empty(0).long()
        apart = config.held_out * config.length
        self.batches: dict[str, Batches] = {}
        self.judged: dict[str, Tensor] = {}
        hashes = []
        for name in self.domains or (config.data or data,):
            tokens = tokenize(tokenizer, load_text(name))
            if len(tokens) < apart + config.length + 1:
                raise CalibrationError(
                    f"{name}: the text has {len(tokens)} tokens, {config.held_out} held-out windows and one batch need "
                    f"{apart + config.length + 1} of length {config.length}; use a longer text, or fewer and shorter windows"
                )
            self.batches[name] = Batches(tokens[:-apart], config.length, config.batch, config.seed)
            self.judged[name] = windows(tokens[-apart:], config.held_out, config.length)
            hashes.append(fingerprint(tokens))
        self.hash = " ".join(hashes)
        even = {n: 1 / len(self.batches) for n in self.batches}
        self.data = Mixture(self.batches, even, config.batch, config.seed)

    def read(self, network: Network, ids: Tensor) -> tuple[Any, Tensor]:
        """Outputs for ``ids`` and the ids that they belong to, the prompt in front and cut away again."""
        whole = torch.cat((self.prompt.to(ids.device).expand(len(ids), -1), ids), 1)
        out = network.forward(whole)
        out.logits = out.logits[:, len(self.prompt) :]
        return out, ids

    def losses(self, network: Network) -> dict[str, float]:
        """Held-out loss of each text."""
        return {n: held_out_loss(network, rows) for n, rows in self.judged.items()}


def _loss(model: Model, student: Network, config: Any, texts: _Texts) -> Callable[[Tensor], Tensor]:
    objective = Objective(text=config.text, logits=config.logits)
    teacher = Network(model).to(student.device) if config.logits else None

    def loss(ids: Tensor) -> Tensor:
        ours, own = texts.read(student, ids)
        with torch.no_grad():
            theirs = texts.read(teacher, ids)[0] if teacher else None
        return compare(ours, theirs, own, objective)

    return loss


def _settings(config: Any, model: Model) -> Training:
    return Training(
        precision=hardware(config, model.device)[1],
        steps=config.steps, accumulate=config.accumulate, learning_rate=config.learning_rate, warmup=config.warmup,
        evaluate_every=config.evaluate_every, save_every=config.evaluate_every, keep_best=False,
    )  # fmt: skip


def _history(state: Any) -> list[dict[str, float | None]]:
    return [{k: None if v != v else v for k, v in row.items()} for row in state.history]


def _with_gates(
    model: Model, student: Network, step: Step, keep: Mapping[str, int], texts: _Texts, folder: Path, tick: Tick | None
) -> Trained:
    config = step.config
    counts = {"blocks": model.blocks, "channels": model.width}
    counts |= {k: units_of(model.architecture, model.config, model.linears(0), k).count for k in ("heads", "neurons")}
    share = {k: keep[k] / n for k, n in counts.items() if keep[k] < n}
    gates = Gates(student, list(share), config.seed)
    student.to(hardware(config, model.device)[0])
    fixed = getattr(config, "penalty", None)
    constraints = 0 if fixed is not None else len(step.method.run(gates.problem(share, 0.0), config))
    own = gates.leaves(constraints)
    held = {id(t) for t in own.values()}
    leaves = {n: t for n, t in student.leaves().items() if id(t) not in held} | own
    rates = {name: config.gate_rate / config.learning_rate for name in own}
    loading: Hook | None = None
    if texts.domains:
        shares = leaves["shares"] = torch.tensor([texts.data.shares[n] for n in texts.domains], dtype=torch.float64)
        loading = _dynamic_loading(
            texts, student, gates, texts.losses(Network(model).to(student.device)), shares, config.reload_every
        )
    plain, now = _loss(model, student, config, texts), {"progress": 0.0}

    def before_step(number: int, progress: float) -> None:
        now["progress"] = progress
        if loading:
            loading(number, progress)
        gates.sample(number)

    def loss(ids: Tensor) -> Tensor:
        terms = step.method.run(gates.problem(share, now["progress"]), config)
        extra = fixed * terms.sum() if gates.multipliers is None else lagrangian(terms, gates.multipliers)
        return plain(ids) + extra

    def held_out() -> float:
        gates.settle()
        values = texts.losses(student)
        return sum(values.values()) / len(values)

    state = train(
        leaves, loss, texts.data, _settings(config, model), held_out=held_out, before_step=before_step, rates=rates,
        folder=folder, identity=_identity(step, model, texts, keep),
        tick=lambda done, total, row: tick(step.name, done, total) if tick else None,
    )  # fmt: skip
    gates.settle()
    expected = {k: float(o.mean()) for k, o in gates.problem(share, 1.0).open.items()}
    record: dict[str, Any] = {"history": _history(state), "expected_open": expected}
    if texts.domains:
        record["shares"] = dict(zip(texts.domains, leaves["shares"].tolist(), strict=True))
    scores = {k: s.cpu() for k, s in gates.scores().items()}
    student.settle()
    return Trained(student.to("cpu"), scores, record)


def _dynamic_loading(
    texts: _Texts, student: Network, gates: Gates, reference: Mapping[str, float], shares: Tensor, every: int
) -> Hook:
    """Moves ``shares``, a leaf of the training's state, every so many steps, and the mixture's shares to them."""

    def before_step(number: int, progress: float) -> None:
        now = dict(zip(texts.domains, shares.tolist(), strict=True))
        if number and number % every == 0:
            gates.settle()
            now = reweighted(now, texts.losses(student), reference)
            shares.copy_(torch.tensor([now[n] for n in texts.domains], dtype=torch.float64))
        texts.data.shares.update(now)

    return before_step


def _with_projections(
    model: Model,
    student: Network,
    step: Step,
    keep: Mapping[str, int],
    texts: _Texts,
    ids: Tensor,
    folder: Path,
    tick: Tick | None,
) -> Trained:
    config = step.config
    saliency = _saliency(model, ids, folder, tick)
    scores = {k: v.clone() for k, v in saliency.items()}
    device = student.to(hardware(config, model.device)[0]).device
    groups = []  # (units, redundant indices, their rank in [0, 1), their factors, the leaf)
    leaves = student.leaves()
    gates: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
    for block in student.blocks:
        for kind in ("heads", "neurons"):
            units = units_of(block.row, block.config, block.linears, kind)
            gone = units.count - keep[kind]
            if not gone:
                continue
            order = saliency[kind][block.number].argsort(stable=True)[:gone]
            scores[kind][block.number, order] = -1.0
            z = leaves[f"factors:{kind}:{block.number}"] = torch.ones(gone, device=device)
            order, rank = order.to(device), torch.arange(gone, device=device) / gone
            units = units.to(device)
            groups.append((block, units, order, rank, z))
            for side, table in (("rows", units.rows), ("columns", units.columns)):
                for name, index in table.items():
                    gates.setdefault(f"{name}.weight", []).append((side, index[order], z))
    for name, cuts in gates.items():
        student.forms[name] = _Shrunk(student.forms[name], cuts)
    before: list[Tensor] = []

    def entries(block: Any, units: Any, order: Tensor) -> Tensor:
        parts = [_weight(student, n)[i[order]].flatten(1) for n, i in units.rows.items()]
        parts += [_weight(student, n).T[i[order]].flatten(1) for n, i in units.columns.items()]
        return torch.cat(parts, 1)

    def before_step(number: int, progress: float) -> None:
        before[:] = [entries(b, u, o) for b, u, o, _, _ in groups]

    def after_step(number: int, progress: float) -> None:
        reached = (number + 1) / config.steps
        for (block, units, order, rank, z), old in zip(groups, before, strict=True):
            gone = (z == 0) | step.method.run(old, entries(block, units, order), config)
            z.copy_(torch.where(gone, 0.0, torch.minimum(z, factor(rank, reached, config))))

    state = train(
        leaves, _loss(model, student, config, texts), texts.data, _settings(config, model),
        held_out=lambda: sum(texts.losses(student).values()) / len(texts.judged),
        before_step=before_step, after_step=after_step, folder=folder, identity=_identity(step, model, texts, keep),
        tick=lambda done, total, row: tick(step.name, done, total) if tick else None,
    )  # fmt: skip
    left = sum(int((z > 0).sum()) for *_, z in groups)
    student.settle()
    return Trained(student.to("cpu"), scores, {"history": _history(state), "not_yet_zero": left})


@dataclass
class _Shrunk:
    """``inner`` with rows or columns of some units multiplied by factors: (side, (units, k) indices, (units,) factors)."""

    inner: Form
    cuts: list[tuple[str, Tensor, Tensor]]

    def leaves(self) -> dict[str, Tensor]:
        return self.inner.leaves()

    def to(self, device: str | torch.device) -> None:
        self.inner.to(device)
        self.cuts = [(side, index.to(device), z.to(device)) for side, index, z in self.cuts]

    def _applied(self, w: Tensor) -> Tensor:
        for side, index, z in self.cuts:
            scale = w.new_ones(w.shape[0] if side == "rows" else w.shape[1])
            scale[index.flatten()] = z.repeat_interleave(index.shape[1])
            w = w * (scale[:, None] if side == "rows" else scale)
        return w

    def weight(self) -> Tensor:
        return self._applied(self.inner.weight())

    @torch.no_grad()
    def final(self) -> Tensor:
        return self._applied(self.inner.final())


@torch.no_grad()
def _weight(student: Network, name: str) -> Tensor:
    return student.forms[f"{name}.weight"].weight()


def _saliency(model: Model, ids: Tensor, folder: Path, tick: Tick | None) -> dict[str, Tensor]:
    """|Σ w g| of every unit, kind → (blocks, units); kept in ``folder`` for a training that is killed."""
    path = folder / "saliency.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        gradients.gather(model, ids, folder, {"samples"}, tick)
        rows: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
        for i in range(model.blocks):
            block, extras = model.load_block(i), gradients.block_extras(folder, i)
            terms = {n: block.weight(n).to(HOST) * e["samples"].mean(0) for n, e in extras.items()}
            for kind, out in rows.items():
                out.append(units_of(block.row, block.config, block.linears, kind).reduce(terms).abs())
        save_file({k: torch.stack(v) for k, v in rows.items()}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        for file in folder.glob("gradients-*.safetensors"):
            file.unlink()
    return load_file(path)


def _identity(step: Step, model: Model, texts: _Texts, keep: Mapping[str, int]) -> str:
    return json.dumps([step.name, asdict(step.config), model.checkpoint.fingerprint(), texts.hash, dict(keep)])
