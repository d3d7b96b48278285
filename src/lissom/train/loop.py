"""The one training loop.

    for step:   gradients of loss(batch(step)), averaged over micro-batches and ranks → clip → Adam → EMA
    sometimes:  held-out loss (with the EMA's weights) → remember the best, stop early;  save the state

What is trained is a dict of leaves, what is minimised a function of token ids: the loop knows neither models nor teachers.
A step depends on its number and the state, nothing else, so that a resumed training ends with the same bytes (a limit in
minutes apart). A loss or gradient that is not finite stops it before the leaves are touched; the state is saved first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core import HOST, CalibrationError, NumericalError, OutputError, moved
from .board import Board
from .ranks import Ranks
from .schedules import Shape, rate, rewound

STATE = "training.safetensors"
LOG = "training.jsonl"


@dataclass(frozen=True)
class Training:
    """Settings of the loop.

    ``steps``, or ``minutes`` if that ends first (the schedule follows whichever is further on). ``accumulate``
    micro-batches make one batch. ``learning_rate`` at its peak after ``warmup`` (a fraction), then ``shape`` down to
    ``floor`` (a fraction); ``rewind``: it starts at this share of the schedule. ``clip`` global gradient norm, ``ema`` decay, both None: off. Every ``evaluate_every`` steps the
    held-out loss is measured; after ``patience`` of them without a new best it ends (None: never); the best leaves are
    what remains, or the last ones if not ``keep_best`` (for trainings that make the model smaller, and so worse, on the way).
    ``precision`` bfloat16: matrix products only, leaves and optimiser stay fp32. ``save_every`` steps: state on disk.
    """

    steps: int = 1000
    minutes: float | None = None
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.05
    shape: Shape = "cosine"
    floor: float = 0.0
    rewind: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    evaluate_every: int = 100
    patience: int | None = None
    keep_best: bool = True
    save_every: int = 200
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or self.evaluate_every < 1 or self.save_every < 1:
            raise ValueError("steps, accumulate, evaluate_every and save_every must be at least 1")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or not 0 <= self.floor <= 1 or not 0 <= self.rewind < 1:
            raise ValueError("learning_rate must be positive, warmup and rewind in [0, 1) and floor in [0, 1]")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, not {self.ema}")
        if self.patience is not None and (self.patience < 1 or not self.keep_best):
            raise ValueError("patience must be at least 1, and stops at a best state, which keep_best must keep")


class Data(Protocol):
    """Where batches come from; see :class:`lissom.train.batches.Batches`."""

    def at(self, step: int) -> Tensor: ...
    def starts(self, step: int) -> list[int]: ...


@dataclass
class State:
    """Everything that changes. ``best``: leaves of the least held-out loss; ``history``: one row an evaluation."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    stale: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    ema: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Tensor], Tensor]
Tick = Callable[[int, int, dict[str, float]], None]


def train(
    leaves: Mapping[str, Tensor],
    loss: Loss,
    data: Data,
    config: Training,
    *,
    held_out: Callable[[], float] | None = None,
    before_step: Callable[[int, float], None] | None = None,
    after_step: Callable[[int, float], None] | None = None,
    rates: Mapping[str, float] | None = None,
    folder: Path | None = None,
    tensorboard: Path | None = None,
    identity: str = "",
    ranks: Ranks | None = None,
    tick: Tick | None = None,
) -> State:
    """Train ``leaves`` in place; returns the state, whose ``history`` has step, seconds, loss and held-out loss.

    ``loss(ids)``: of one micro-batch (sequences, tokens), a mean. ``held_out()``: a loss in nats. ``before_step(step,
    progress)``: for what a schedule changes (masks, gates); ``after_step``: for projections, when the leaves have moved.
    ``rates``: leaf → factor of its learning rate, 1 where absent; such leaves have no weight decay. A leaf that needs no
    gradient is state of these hooks: it stays as they leave it and is saved with the rest. ``folder``: for the state and a
    log; a state that is there is resumed if its ``identity`` (of data, model and settings) is the same, else
    :class:`OutputError`. ``tensorboard``: a folder for its event files. Raises :class:`NumericalError` when a loss or
    gradient is not finite: the leaves are then the last good ones.
    """
    ranks = ranks or Ranks()
    names = list(leaves)
    if not names:
        raise CalibrationError("nothing is to be trained: every layer's stored form is fixed")
    tensors = [leaves[n] for n in names]
    device = tensors[0].device
    moving = {n: t for n, t in leaves.items() if t.requires_grad}
    factors = [(rates or {}).get(n, 1.0) for n in moving]
    groups = [
        {"params": [t], "weight_decay": 0.0} if n in (rates or {}) else {"params": [t]} for n, t in moving.items()
    ]
    optimiser = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    identity = json.dumps([identity, {k: v for k, v in asdict(config).items() if k != "save_every"}], sort_keys=True)
    state = _load(folder, identity, names, tensors, optimiser) if folder else State()
    if config.ema is not None and not state.ema:
        state.ema = {n: t.detach().clone() for n, t in moving.items()}
    started = time.perf_counter() - state.seconds
    board = Board(tensorboard if ranks.rank == 0 else None)

    def evaluate(row: dict[str, float]) -> None:
        with _using(names, tensors, state.ema):
            value = ranks.mean(held_out()) if held_out else math.nan
            if held_out and value < state.best_loss:
                state.best_loss, state.stale = value, 0
                if config.keep_best:
                    state.best = {n: t.detach().clone() for n, t in leaves.items()}
            elif held_out:
                state.stale += 1
        state.history.append({**row, "held_out": value})
        if folder and ranks.rank == 0:
            _log(folder, state.history[-1])
        board.write(int(row["step"]), {"held_out": value, "perplexity": math.exp(min(value, 700.0))})

    def save() -> None:
        if folder and ranks.rank == 0:
            _save(folder, identity, state, names, tensors, optimiser)

    def bad(what: str, step: int) -> NumericalError:
        save()
        kept = f"; the state before it is in {folder}" if folder else ""
        return NumericalError(
            f"the {what} of step {step + 1} is not finite (windows at tokens {data.starts(step)}): stopped with the last "
            f"good weights{kept}. Lower learning_rate, set clip, or look at that text"
        )

    if state.step == 0 and not state.history:
        evaluate({"step": 0, "seconds": 0.0, "loss": math.nan})
    while not state.finished and state.step < config.steps:
        step = state.step
        progress = step / config.steps
        if config.minutes is not None:
            spent = ranks.mean((time.perf_counter() - started) / 60 / config.minutes)
            if spent >= 1:
                break
            progress = max(progress, spent)
        if before_step:
            before_step(step, progress)
        mine = ranks.share(data.at(step)).to(device)
        total = 0.0
        optimiser.zero_grad(set_to_none=True)
        for part in _micro(mine, config.accumulate):
            with torch.enable_grad(), device, _autocast(config.precision, device):
                value = loss(part) * (len(part) / len(mine))
            value.backward()
            total += float(value.detach())
        if not math.isfinite(ranks.mean(total)):
            raise bad("loss", step)
        gradients = [t.grad for t in tensors if t.grad is not None]
        ranks.average(gradients)
        limit = math.inf if config.clip is None else config.clip
        norm = float(torch.nn.utils.clip_grad_norm_(tensors, limit))
        if not math.isfinite(norm):
            raise bad("gradient", step)
        at = rewound(max(progress, 1 / config.steps / 2), config.rewind)
        now = rate(at, config.warmup, config.shape, config.floor)
        for group, factor in zip(optimiser.param_groups, factors, strict=True):
            group["lr"] = config.learning_rate * now * factor
        optimiser.step()
        if after_step:
            after_step(step, progress)
        for n, average in state.ema.items():
            average.lerp_(leaves[n].detach(), 1 - config.ema)  # type: ignore[operator]
        state.step, state.seconds = step + 1, time.perf_counter() - started
        row = {"step": state.step, "seconds": state.seconds, "loss": ranks.mean(total)}
        board.write(
            state.step, {"loss": row["loss"], "gradient_norm": norm, "learning_rate": config.learning_rate * now}
        )
        last = state.step == config.steps
        if state.step % config.evaluate_every == 0 or last:
            evaluate(row)
            state.finished = config.patience is not None and state.stale >= config.patience
        if tick:
            tick(state.step, config.steps, state.history[-1] | row)
        if state.step % config.save_every == 0:
            save()
    if state.history[-1]["step"] != state.step:  # the minutes ended between two evaluations
        evaluate({"step": state.step, "seconds": state.seconds, "loss": math.nan})
    state.finished = True
    save()
    board.close()
    _set(names, tensors, state.best or state.ema)
    return state


def _micro(batch: Tensor, parts: int) -> list[Tensor]:
    """``batch`` cut into at most ``parts`` micro-batches."""
    return list(batch.split(max(1, math.ceil(len(batch) / parts))))


def _autocast(precision: str, device: torch.device) -> Any:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def _set(names: list[str], tensors: list[Tensor], values: Mapping[str, Tensor]) -> None:
    for n, t in zip(names, tensors, strict=True):
        if n in values:
            t.copy_(values[n])


@contextlib.contextmanager
def _using(names: list[str], tensors: list[Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The leaves hold ``values`` for a while (no values: they stay as they are)."""
    before = {n: t.detach().clone() for n, t in zip(names, tensors, strict=True)} if values else {}
    _set(names, tensors, values)
    with torch.no_grad():
        yield
    _set(names, tensors, before)


# the state on disk: one safetensors file, whole or absent


def _save(
    folder: Path, identity: str, state: State, names: list[str], tensors: list[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    out = {f"leaf:{n}": t.detach().contiguous() for n, t in zip(names, tensors, strict=True)}
    for n, t in zip(names, tensors, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimiser.state[t]:
                out[f"{key}:{n}"] = optimiser.state[t][key].contiguous()
    out |= {f"ema:{n}": t.contiguous() for n, t in state.ema.items()}
    out |= {f"best:{n}": t.contiguous() for n, t in state.best.items()}
    plain = {k: v for k, v in asdict(replace(state, ema={}, best={})).items() if k not in ("ema", "best")}
    temporary = folder / (STATE + ".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(moved(out, HOST), temporary, {"identity": identity, "state": json.dumps(plain)})
        os.replace(temporary, folder / STATE)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot save the training in {folder}: {error}; the state saved before is kept: free space and run again"
        ) from error


def _load(
    folder: Path, identity: str, names: list[str], tensors: list[Tensor], optimiser: torch.optim.Optimizer
) -> State:
    path = folder / STATE
    if not path.is_file():
        return State()
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise OutputError(f"{path} is damaged ({error}): remove it, and the training starts again") from error
    with opened as file:
        about = file.metadata() or {}
        if about.get("identity") != identity:
            raise OutputError(
                f"{path} belongs to a training with other settings, data or weights; remove it, or go back to the old ones"
            )
        held = set(file.keys())
        state = State(**json.loads(about["state"]))
        _set(names, tensors, {n: file.get_tensor(f"leaf:{n}") for n in names})
        state.ema = {n: file.get_tensor(f"ema:{n}").to(tensors[0].device) for n in names if f"ema:{n}" in held}
        state.best = {n: file.get_tensor(f"best:{n}").to(tensors[0].device) for n in names if f"best:{n}" in held}
        for n, t in zip(names, tensors, strict=True):
            if f"exp_avg:{n}" in held:
                moments = {k: file.get_tensor(f"{k}:{n}").to(t.device) for k in ("exp_avg", "exp_avg_sq")}
                optimiser.state[t] = {"step": torch.tensor(float(state.step), device=t.device), **moments}
    return state


def _log(folder: Path, row: Mapping[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({k: None if math.isnan(v) else v for k, v in row.items()}) + "\n")
