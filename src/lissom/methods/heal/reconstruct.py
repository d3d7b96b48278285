"""Block-wise reconstruction: train the kept weights of one block to give the dense block's output.

    minimise over θ     mean over tokens  ‖ f(x; w(θ)) − F(x_dense) ‖² / ‖ F(x_dense) ‖²

``F`` is the dense block, ``f`` the same block with legal weights w(θ) (:mod:`.legal`: mask, scales and zero points fixed).
No gradient crosses the block, so memory and time are those of one block, and it streams. ``inputs`` says what f reads:
``compressed`` (what the blocks before it now give; the error that they left is repaired too), ``dense``, or ``both``
in turns. Dividing by each token's own norm matters: the next block normalises its input, and a few tokens (the first
of a text above all) have norms hundreds of times larger, which a plain mean would fit and nothing else.

Some samples are held back; the weights of the epoch with the least held-back error are returned, so training never
makes the held-back error worse than that of the solver.

Sources: EBFT (Guo et al. 2024, arXiv 2402.12419) for sparse weights, BRECQ (Li et al. 2021, arXiv 2102.05426) for
rounded ones. Differs from EBFT: the relative loss, cosine decay, held-back samples instead of a convergence threshold.
Costs 3 forward passes of a block per token and epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...core import BlockProblem, NumericalError, Solved
from .legal import Legal


@dataclass(frozen=True)
class Reconstruct:
    """``epochs`` over the samples; ``batch`` samples a step; ``learning_rate`` of Adam at its peak (after ``warmup`` of all
    steps; then cosine to zero); ``inputs`` compressed|dense|both; ``held_back`` fraction of samples; ``seed`` of the order."""

    epochs: int = 4
    batch: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.1
    inputs: Literal["compressed", "dense", "both"] = "compressed"
    held_back: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs and batch must be at least 1, not {self.epochs} and {self.batch}")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or not 0 <= self.held_back < 1:
            raise ValueError("learning_rate must be positive, warmup and held_back in [0, 1)")


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖found − wanted‖² / ‖wanted‖²; both (…, width)."""
    scale = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - wanted).square().sum(-1) / scale).mean()


def reconstruct(problem: BlockProblem, config: Reconstruct) -> dict[str, Solved]:
    """New solutions for every layer; their ``notes`` carry the held-back error of the block before and after."""
    legal = {name: Legal.of(s) for name, s in problem.solved.items()}
    latent = {n: problem.solved[n].weight.clone().requires_grad_() for n, rule in legal.items() if rule is not None}
    fixed = {n: s.weight for n, s in problem.solved.items() if n not in latent}
    if not latent:
        return dict(problem.solved)
    compressed, dense, targets = (_samples(t) for t in (problem.inputs, problem.dense_inputs, problem.targets))
    held = round(config.held_back * len(targets)) if len(targets) > 1 else 0
    held = min(max(held, 1 if config.held_back else 0), len(targets) - 1)
    train = len(targets) - held
    judged = range(train, len(targets)) if held else range(train)

    def weights() -> dict[str, Tensor]:
        return fixed | {n: legal[n].weight(t) for n, t in latent.items()}  # type: ignore[union-attr]

    @torch.no_grad()
    def judge() -> float:
        """The error on the samples held back, always on what the compressed model feeds the block."""
        now = weights()
        return sum(float(relative_error(problem.forward(now, compressed[i]), targets[i])) for i in judged) / len(judged)

    generator = torch.Generator().manual_seed(config.seed * 100_003 + problem.number)
    optimiser = torch.optim.Adam(list(latent.values()), lr=config.learning_rate, betas=(0.9, 0.95))
    per_epoch = math.ceil(train / config.batch)
    total = config.epochs * per_epoch
    before = best = judge()
    kept = {n: t.detach().clone() for n, t in latent.items()}
    step = 0
    with torch.enable_grad():
        for _ in range(config.epochs):
            order = torch.randperm(train, generator=generator).tolist()
            for at in range(0, train, config.batch):
                optimiser.param_groups[0]["lr"] = config.learning_rate * rate(step, total, config.warmup)
                chosen = order[at : at + config.batch]
                source = _source(config.inputs, step, compressed, dense)
                loss = relative_error(
                    problem.forward(weights(), torch.cat([source[i] for i in chosen])),
                    torch.cat([targets[i] for i in chosen]),
                )
                if not bool(torch.isfinite(loss)):
                    raise NumericalError(
                        f"block {problem.number}: the reconstruction loss is {float(loss.detach())} at step {step + 1} of {total}; "
                        "lower learning_rate"
                    )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                step += 1
            now = judge()
            if now < best:
                best, kept = now, {n: t.detach().clone() for n, t in latent.items()}
    notes = {"block_error_before": before, "block_error_after": best}
    return {n: _finish(s, legal[n], kept.get(n), notes) for n, s in problem.solved.items()}


def rate(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: linear up over ``warmup · total`` steps, then half a cosine down to zero."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _samples(batches: Sequence[Tensor]) -> list[Tensor]:
    """Batches of any size → one tensor (1, tokens, width) for each sample, as views."""
    return [row for batch in batches for row in batch.split(1)]


def _source(inputs: str, step: int, compressed: list[Tensor], dense: list[Tensor]) -> list[Tensor]:
    return dense if inputs == "dense" or (inputs == "both" and step % 2) else compressed


def _finish(solved: Solved, rule: Legal | None, latent: Tensor | None, notes: Mapping[str, float]) -> Solved:
    if rule is None or latent is None:
        return solved
    return replace(rule.solved(latent, solved), notes={**solved.notes, **notes})
