"""BESA: sparsity rates of a block's layers, learned by gradient descent on the block's output.

    candidate rates p_1 < … < p_D;  layer l has probabilities β = softmax(logits) over them, its rate is α_l = Σ_d β_d p_d
    weights of a row are sorted by Wanda's score |w| ‖X_c‖; one at rank share q goes with probability P(q) = Σ_{d: p_d > q} β_d
    forward   hard masks: exactly the α_l lowest of every row go          backward   as if the mask were 1 − P(q) (straight through)
    minimise  ‖F(W ⊙ M, X) − F(W, X₀)‖² / (the same at equal rates)  +  λ (mean α / S − 1)²          by Adam, one sample a step

Blocks stream by: X is what the pruned blocks before give, X₀ what the dense ones give, and the next block sees this one pruned. The
mean over the block's weights is then met exactly. After every epoch the exact rates are measured on all samples with their
hard masks, equal rates first of all, and the best are kept: the block's error is never above Wanda's at equal sparsity there.
Source: Xu, Shao, Chen, Tang, Zhang, Gao, An, Qiao, Luo, ICLR 2024 (arXiv 2402.16880), eqs. 2–6; methods/03 §18 (D = 100).
Differs: candidates lie within ``spread`` of the target instead of anywhere, so that few steps suffice; hard masks meet α to the
weight (the paper cuts P at α); rates by layer, since an allocation serves any solver (the paper has rows, too).
Cost: three forwards of each block for every sample and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core import BlockProblem, Budget, LayerSummary, Solved
from .budget import bounds, meet


@dataclass(frozen=True)
class BESA:
    """``candidates``: D. ``spread``: rates within S ± spread. ``penalty``: λ. ``epochs`` over the samples, ``rate`` of Adam."""

    candidates: int = 100
    spread: float = 0.2
    penalty: float = 10.0
    epochs: int = 4
    rate: float = 0.1


@dataclass(frozen=True)
class Sorted:
    """A layer with the rank of every weight in its row by Wanda's score, from 0, (out, in)."""

    weight: Tensor
    rank: Tensor

    @classmethod
    def of(cls, weight: Tensor, norm: Tensor) -> Sorted:
        return cls(weight, (weight.abs() * norm).argsort(dim=1, stable=True).argsort(dim=1))

    def hard(self, rate: float) -> Tensor:
        """Keep-mask without the lowest ``rate`` of every row."""
        return self.rank >= round(rate * self.rank.shape[1])

    def masked(self, beta: Tensor, rates: Tensor) -> Tensor:
        """The weight under its hard mask, with the gradient of the soft one."""
        alpha = float(beta.detach() @ rates)
        share = (torch.arange(self.rank.shape[1]) + 0.5) / self.rank.shape[1]
        gone = ((rates > share[:, None]).to(beta.dtype) @ beta).to(self.weight.dtype)  # P at every rank
        soft = 1 - torch.nn.functional.embedding(self.rank, gone[:, None])[..., 0]
        hard = self.hard(alpha).to(self.weight.dtype)
        return self.weight * (hard + soft - soft.detach())


def block_error(problem: BlockProblem, weights: Mapping[str, Tensor]) -> float:
    """Sum of squares of the block's output error over all samples."""
    pairs = zip(problem.inputs, problem.targets, strict=True)
    return float(sum((problem.forward(weights, h) - t).square().sum(dtype=torch.double) for h, t in pairs))


def learn(problem: BlockProblem, target: float, config: BESA) -> dict[str, Solved]:
    """The block's layers under Wanda's masks at the learned rates; ``notes``: ``rate``, and the block's error (relative to
    the outputs' energy) at equal rates and at the learned ones."""
    names = list(problem.solved)
    layers = [Sorted.of(problem.solved[n].weight, problem.stats[n].norm) for n in names]
    sizes = [layer.weight.numel() for layer in layers]
    low, high = bounds(target, config.spread, config.spread)

    def exact(rates: Sequence[float]) -> tuple[float, list[float]]:
        met = meet(list(rates), sizes, target, low, high)
        weights = {n: s.weight * s.hard(r) for n, s, r in zip(names, layers, met, strict=True)}
        return block_error(problem, weights), met

    equal, rates = exact([target] * len(names))
    best = equal
    if config.spread > 0 and equal > 0 and len(names) > 1:
        for wanted in _descent(problem, names, layers, sizes, (low, high), target, equal, config):
            error, met = exact(wanted)
            if error < best:
                best, rates = error, met
    energy = max(float(sum(t.square().sum(dtype=torch.double) for t in problem.targets)), 1e-30)
    notes = {"block_error_equal": equal / energy, "block_error": best / energy}
    out = {}
    for name, layer, rate in zip(names, layers, rates, strict=True):
        mask = layer.hard(rate)
        weight = torch.where(mask, layer.weight, 0.0)
        out[name] = Solved(weight, None, mask, torch.zeros(len(weight)), {"rate": rate, **notes})
    return out


def _descent(
    problem: BlockProblem,
    names: Sequence[str],
    layers: Sequence[Sorted],
    sizes: Sequence[int],
    limits: tuple[float, float],
    target: float,
    equal: float,
    config: BESA,
):
    """The layers' rates after every epoch."""
    p = torch.tensor(np.linspace(*limits, config.candidates), dtype=torch.float32)
    share = torch.tensor(sizes) / sum(sizes)
    start = -2 * ((p - target) / config.spread).square()
    logits = start.repeat(len(names), 1).requires_grad_()
    adam = torch.optim.Adam([logits], lr=config.rate)
    samples = [
        (h[i : i + 1], t[i : i + 1])
        for h, t in zip(problem.inputs, problem.targets, strict=True)
        for i in range(len(h))
    ]
    for _ in range(config.epochs):
        with torch.enable_grad():  # a run as a whole keeps no gradients
            for h, t in samples:
                beta = logits.softmax(1)
                weights = {n: s.masked(b, p) for n, s, b in zip(names, layers, beta, strict=True)}
                error = (problem.forward(weights, h) - t).square().sum() * (len(samples) / equal)
                loss = error + config.penalty * ((share * (beta @ p)).sum() / target - 1).square()
                adam.zero_grad()
                loss.backward()
                adam.step()
        yield (logits.detach().softmax(1) @ p).tolist()


def besa(layers: Sequence[LayerSummary], target: float, config: BESA) -> Budget:
    """The learned rates; every block meets the target."""
    return Budget("sparsity", {layer.name: layer.values["rate"] for layer in layers})
