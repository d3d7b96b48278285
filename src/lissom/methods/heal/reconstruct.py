"""Block-wise reconstruction: train the kept weights of one block to give the dense block's output.

    minimise over θ     mean over tokens  ‖ f(x; w(θ)) − F(x_dense) ‖² / ‖ F(x_dense) ‖²

``F`` is the dense block, ``f`` the same block with legal weights w(θ) (:mod:`.legal`: mask, scales and zero points fixed).
No gradient crosses the block, so memory and time are those of one block, and it streams. ``inputs`` says what f reads:
``compressed`` (what the blocks before it now give; the error that they left is repaired too), ``dense``, or ``both``
in turns. Dividing by each token's own norm matters: the next block normalises its input, and a few tokens (the first
of a text above all) have norms hundreds of times larger, which a plain mean would fit and nothing else.

``reselect`` > 0 lets the masks of unstructured layers move: at ``rounds`` moments of the first 60% of the steps, that share of
a layer's kept weights, those whose removal costs least, changes places with the removed ones that would help most:

    cost  θ² h        gain  ḡ² / h        h_ij = r_i c_j / Σ r,   r, c: sums of E[g²] over rows and columns

with g the gradients of single samples at *all* weights, ḡ their mean: the diagonal of the Fisher matrix stands for the
Hessian, smoothed to rank one as it is for one layer (outputs' gradient times input; Adafactor, arXiv 1804.04235). Growing by
gradient is RigL's rule (arXiv 1911.11134). The number of zeros stays.

``scales`` > 0 trains the scales of grids too, each by a factor e^t with t from 0 at that learning rate: at 2 bits the codes
alone hardly move (EfficientQAT, arXiv 2407.11062, trains both block by block).

Some samples are held back; the weights of the epoch with the least held-back error are returned, so training never
makes the held-back error worse than that of the solver.

Sources: EBFT (Guo et al. 2024, arXiv 2402.12419) for sparse weights, BRECQ (Li et al. 2021, arXiv 2102.05426) for
rounded ones. Differs from EBFT: the relative loss, cosine decay, held-back samples instead of a convergence threshold.
Costs 3 forward passes of a block per token and epoch, and as much for 8 samples a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...core import HOST, BlockForward, BlockProblem, NumericalError, Solved
from .legal import Legal


@dataclass(frozen=True)
class Reconstruct:
    """``epochs`` over the samples; ``batch`` samples a step; ``learning_rate`` of Adam at its peak (after ``warmup`` of all
    steps; then cosine to zero); ``inputs`` compressed|dense|both; ``held_back`` fraction of samples; ``reselect`` fraction of the
    kept weights that change places in each of ``rounds``; ``scales`` learning rate of the logarithms of the grids' scales, 0 keeps
    them; ``seed`` of the order."""

    epochs: int = 4
    batch: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.1
    inputs: Literal["compressed", "dense", "both"] = "compressed"
    held_back: float = 0.125
    reselect: float = 0.0
    rounds: int = 3
    scales: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.rounds < 1:
            raise ValueError(
                f"epochs, batch and rounds must be at least 1, not {self.epochs}, {self.batch} and {self.rounds}"
            )
        if self.scales < 0:
            raise ValueError(f"scales must be at least 0, not {self.scales}")
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or not 0 <= self.held_back < 1:
            raise ValueError("learning_rate must be positive, warmup and held_back in [0, 1)")
        if not 0 <= self.reselect < 1:
            raise ValueError(f"reselect must be at least 0 and below 1, not {self.reselect}")


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖found − wanted‖² / ‖wanted‖²; both (…, width)."""
    scale = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - wanted).square().sum(-1) / scale).mean()


def reconstruct(problem: BlockProblem, config: Reconstruct) -> dict[str, Solved]:
    """New solutions for every layer; their ``notes`` carry the held-back error of the block before and after."""
    start = {name: Legal.of(s) for name, s in problem.solved.items()}
    legal = {name: rule for name, rule in start.items() if rule is not None}
    latent = {n: problem.solved[n].weight.clone().requires_grad_() for n in legal}
    coded = {n: c for n, rule in legal.items() if (c := rule.codes) is not None}
    stretch = {n: torch.zeros_like(c.scale).requires_grad_() for n, c in coded.items()} if config.scales else {}
    fixed = {n: s.weight for n, s in problem.solved.items() if n not in latent}
    if not latent:
        return dict(problem.solved)
    compressed, dense, targets = (_samples(t) for t in (problem.inputs, problem.dense_inputs, problem.targets))
    held = round(config.held_back * len(targets)) if len(targets) > 1 else 0
    held = min(max(held, 1 if config.held_back else 0), len(targets) - 1)
    train = len(targets) - held
    judged = range(train, len(targets)) if held else range(train)

    device = next(iter(latent.values())).device

    def here(samples: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        return torch.cat([samples[i] for i in chosen]).to(device)

    def weights() -> dict[str, Tensor]:
        return fixed | {n: legal[n].weight(t, stretch.get(n)) for n, t in latent.items()}

    @torch.no_grad()
    def judge() -> float:
        """The error on the samples held back, always on what the compressed model feeds the block."""
        now = weights()
        return sum(
            float(relative_error(problem.forward(now, here(compressed, [i])), here(targets, [i]))) for i in judged
        ) / len(judged)

    generator = torch.Generator().manual_seed(config.seed * 100_003 + problem.number)
    groups = [
        {"params": list(leaves.values()), "peak": peak}
        for leaves, peak in ((latent, config.learning_rate), (stretch, config.scales))
        if leaves
    ]
    optimiser = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    per_epoch = math.ceil(train / config.batch)
    total = config.epochs * per_epoch
    movable = [n for n in legal if n in problem.free and legal[n].mask is not None] if config.reselect else []
    rounds = (
        {round(_MOVING * total * (i + 1) / (config.rounds + 1)) for i in range(config.rounds)} if movable else set()
    )
    before = best = judge()
    kept, scaled, rules = _copies(latent), _copies(stretch), dict(legal)
    step = 0
    with torch.enable_grad():
        for _ in range(config.epochs):
            order = torch.randperm(train, generator=generator, device=HOST).tolist()
            for at in range(0, train, config.batch):
                if step in rounds:
                    some = [(here(compressed, [i]), here(targets, [i])) for i in order[:_LOOKED_AT]]
                    gradients = _gradients(problem.forward, weights(), movable, some)
                    for n in movable:
                        legal[n] = _moved(
                            legal[n], latent[n], gradients[n], config.reselect, optimiser.state[latent[n]]
                        )
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * rate(step, total, config.warmup)
                chosen = order[at : at + config.batch]
                source = _source(config.inputs, step, compressed, dense)
                loss = relative_error(
                    problem.forward(weights(), here(source, chosen)),
                    here(targets, chosen),
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
                best, kept, scaled, rules = now, _copies(latent), _copies(stretch), dict(legal)
    notes = {"block_error_before": before, "block_error_after": best}
    return {n: _finish(s, rules.get(n), kept.get(n), scaled.get(n), notes) for n, s in problem.solved.items()}


_MOVING = 0.6  # share of the steps in which masks may move; the rest is for the weights to settle
_LOOKED_AT = 8  # samples whose gradients choose the weights that move


def _gradients(
    forward: BlockForward, weights: dict[str, Tensor], names: list[str], pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, list[Tensor]]:
    """Gradients of the loss of every single pair (input, target) at all entries of the named weights."""
    leaves = {n: weights[n].detach().requires_grad_() for n in names}
    rest = {n: w.detach() for n, w in weights.items()}
    out: dict[str, list[Tensor]] = {n: [] for n in names}
    for x, y in pairs:
        loss = relative_error(forward(rest | leaves, x), y)
        for n, g in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            out[n].append(g)
    return out


@torch.no_grad()
def _moved(rule: Legal, latent: Tensor, gradients: list[Tensor], share: float, moments: dict[str, Tensor]) -> Legal:
    """``rule`` with ``share`` of its kept weights exchanged; what comes in starts at zero, without momentum."""
    mask = rule.mask
    assert mask is not None
    F = torch.stack(gradients).square().mean(0)
    h = torch.outer(F.sum(1), F.sum(0)) / F.sum().clamp_min(1e-30)
    h = h.clamp_min(1e-30)
    count = min(round(share * int(mask.sum())), int((~mask).sum()))
    if count == 0:
        return rule
    cost = (latent.square() * h).masked_fill(~mask, math.inf).flatten()
    gain = (torch.stack(gradients).mean(0).square() / h).masked_fill(mask, -math.inf).flatten()
    leaves, enters = cost.topk(count, largest=False).indices, gain.topk(count).indices
    new = mask.flatten().clone()
    new[leaves], new[enters] = False, True
    latent.view(-1)[torch.cat((leaves, enters))] = 0.0
    if moments:
        typical = moments["exp_avg_sq"][mask].mean()
        moments["exp_avg"].view(-1)[enters], moments["exp_avg_sq"].view(-1)[enters] = 0.0, typical
        moments["exp_avg"].view(-1)[leaves] = 0.0
    return Legal(new.view_as(mask), rule.codes)


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


def _copies(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in leaves.items()}


def _finish(
    solved: Solved, rule: Legal | None, latent: Tensor | None, stretch: Tensor | None, notes: Mapping[str, float]
) -> Solved:
    if rule is None or latent is None:
        return solved
    return replace(rule.solved(latent, solved, stretch), mask=rule.mask, notes={**solved.notes, **notes})
