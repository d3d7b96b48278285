"""BESA: sparsity rates of a block's layers, learned through a differentiable mixture of rates.

    candidate rates p_1 < … < p_D; each layer has probabilities β = softmax(logits), its rate is α = Σ β_d p_d
    minimise   Σ_l β_l · e_l / energy  +  λ (mean α / S − 1)²      by Adam; then the mean is met exactly

e_l(p) is the layer's error when Wanda prunes it at rate p (by rows, no update), measured on its Gram matrix.
Source: Xu, Shao, Chen, Tang, Zhang, Gao, An, Qiao, Luo, ICLR 2024 (arXiv 2402.16880), eqs. 3–6; methods/03 §18.
Differs, because an allocation is a function of small summaries: the block's output error is replaced by the sum of its layers'
errors, each relative to its own output energy, tabulated at the candidate rates once, so the paper's soft masks and straight-through
gradients become a mixture of tabulated errors. Rates are learned by block, as in the paper, and lie within ``spread`` of the
target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...core import Budget, LayerSummary, Problem, Sparse, damped
from .budget import bounds, meet


@dataclass(frozen=True)
class BESA:
    """``candidates``: D. ``spread``: rates within S ± spread. ``penalty``: λ. ``steps``, ``rate`` of Adam. ``damping`` of H."""

    candidates: int = 9
    spread: float = 0.15
    penalty: float = 10.0
    steps: int = 300
    rate: float = 0.05
    damping: float = 0.01


def candidate_rates(target: float, config: BESA) -> list[float]:
    """D rates around the target, within [0, 0.98]."""
    low, high = bounds(target, config.spread, config.spread)
    return [float(p) for p in np.linspace(low, high, config.candidates)]


def summarise(problems: Sequence[Problem], target: float, config: BESA) -> list[dict[str, float]]:
    """Relative error of each layer at each candidate rate, under keys ``error 0`` … ``error D−1``."""
    out = []
    for problem in problems:
        H, _ = damped(problem.stats.hessian, config.damping)
        score = problem.weight.abs() * problem.stats.norm
        energy = 0.5 * ((problem.weight @ H) * problem.weight).sum(1)
        errors = []
        for p in candidate_rates(target, config):
            removed = torch.where(Sparse(p, "row").select(score), 0.0, problem.weight)
            errors.append(0.5 * ((removed @ H) * removed).sum(1))
        for rows, _ in problem.constraint.slices():
            total = max(float(energy[rows].sum()), 1e-30)
            out.append({f"error {d}": float(e[rows].sum()) / total for d, e in enumerate(errors)})
    return out


def learn_rates(
    errors: np.ndarray, sizes: np.ndarray, rates: Sequence[float], target: float, config: BESA
) -> list[float]:
    """Rates of the layers of one block; ``errors: (layers, D)``."""
    e = torch.from_numpy(errors / max(float(errors.mean()), 1e-30)).double()
    p = torch.tensor(rates, dtype=torch.double)
    share = torch.from_numpy(sizes / sizes.sum()).double()
    # start at the rate nearest to the target, softly
    logits = (-((p - target) / config.spread).square()).repeat(len(errors), 1).requires_grad_()
    adam = torch.optim.Adam([logits], lr=config.rate)
    with torch.enable_grad():  # a run as a whole keeps no gradients
        for _ in range(config.steps):
            beta = logits.softmax(1)
            mean = (share * (beta @ p)).sum()
            loss = (beta * e).sum() + config.penalty * ((mean - target) / config.spread).square()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return [float(a) for a in logits.detach().softmax(1) @ p]


def besa(layers: Sequence[LayerSummary], target: float, config: BESA) -> Budget:
    """Learn the rates block by block, each block meeting the target."""
    values: dict[str, float] = {}
    rates = candidate_rates(target, config)
    for block in sorted({layer.block for layer in layers}):
        members = [layer for layer in layers if layer.block == block]
        sizes = np.array([layer.size for layer in members])
        if config.spread == 0:
            learned = [target] * len(members)
        else:
            errors = np.array([[m.values[f"error {d}"] for d in range(config.candidates)] for m in members])
            wanted = learn_rates(errors, sizes, rates, target, config)
            learned = meet(wanted, sizes.tolist(), target, rates[0], rates[-1])
        values |= {member.name: v for member, v in zip(members, learned, strict=True)}
    return Budget("sparsity", {layer.name: values[layer.name] for layer in layers})
