"""Predictor search: measure a few plans, learn what makes a plan good, search many by the predictor, and measure the best.

    plan       one offset for every block and every role (or one for every layer), budgets S + offsets, met exactly
    measure    true next-token loss on held-out text of the model pruned under the plan by a cheap method (``trial``)
    predictor  gradient-boosted trees from a plan's mean sparsity by block, role and part of the depth to its loss
    search     evolution: the best plans are crossed and mutated, most where the predictor's feature ranking says it matters
    verify     the ``verify`` best, distinct plans are measured and taught to the predictor; ``rounds`` times

The best of all measured plans is taken, and the uniform one is measured first: on that text the result is never worse. How far the
predictor can be trusted is told by Kendall's τ between predictions and measurements that it was not fitted on (5 folds).
Plans are measured with the cheap method, whatever solver spends the budgets, since the order of plans hardly depends on it.
Source: Ji, Cao, Liu 2023 (arXiv 2309.09507; abstract read); methods/03 §29 (non-neural predictor, feature ranking, 10⁴–10⁵ plans
searched). Differs: sparsity of layers or units instead of LLM-Pruner's ratios alone; smooth profiles over depth among the samples.
Cost: (plans + rounds · verify) passes over ``trial_samples`` + ``trial_windows`` windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...core import Budget, LayerSummary
from .budget import bounds, meet

_FOLDS, _POPULATION = 5, 64
Measure = Callable[[Budget, Sequence[LayerSummary], float, str], float]


@dataclass(frozen=True)
class PredictorSearch:
    """``plans`` measured to begin with; ``search``: plans that are predicted, in each of ``rounds``, whose ``verify`` best are measured.
    ``spread``: budgets within S ± spread. ``granularity`` of the offsets: block-role (their sum) or layer. ``trial``: the
    method that prunes in trials, on ``trial_samples`` of calibration text, measured on ``trial_windows`` held-out ones. ``seed``.
    """

    plans: int = 40
    search: int = 10_000
    rounds: int = 2
    verify: int = 4
    spread: float = 0.2
    granularity: Literal["block-role", "layer"] = "block-role"
    trial: Literal["magnitude", "wanda", "ria", "sparsegpt"] = "wanda"
    trial_samples: int = 4
    trial_windows: int = 4
    seed: int = 0


class Space:
    """Genes (offsets) → budgets of layers → features of the predictor; plans are rows of arrays."""

    def __init__(self, layers: Sequence[LayerSummary], target: float, config: PredictorSearch):
        self.layers, self.target, self.spread = list(layers), target, config.spread
        self.sizes = np.array([layer.size for layer in layers], float)
        blocks = sorted({layer.block for layer in layers})
        roles = list(dict.fromkeys(layer.role for layer in layers))
        by_block = np.array([[float(la.block == b) for la in layers] for b in blocks])
        by_role = np.array([[float(la.role == r) for la in layers] for r in roles])
        self.depth = np.array([blocks.index(la.block) for la in layers]) / max(1, len(blocks) - 1)
        own = np.eye(len(layers))
        self.genes = own if config.granularity == "layer" else np.concatenate([by_block, by_role])  # (genes, layers)
        self.places = self.depth if config.granularity == "layer" else np.linspace(0, 1, len(blocks))
        quarter = [(self.depth >= q) & (self.depth <= q + 0.25) for q in (0, 0.25, 0.5, 0.75)]
        parts = np.concatenate(
            [by_block, by_role, np.array(quarter, float), *([own] if len(own) == len(self.genes) else [])]
        )
        used = parts.max(1) > 0
        weights = parts[used] * self.sizes
        self.parts = weights / weights.sum(1, keepdims=True)
        names = [f"block {b}" for b in blocks] + roles + [f"quarter {q}" for q in range(1, 5)]
        names += [la.name for la in layers] if len(own) == len(self.genes) else []
        self.names = [n for n, u in zip(names, used, strict=True) if u]
        self.low, self.high = bounds(target, config.spread, config.spread)

    def random(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Genes of ``count`` plans: smooth profiles over depth, independent offsets, and sums of both, of any width."""
        waves = np.cos(np.pi * np.arange(1, 4)[:, None] * self.places)  # falling, bent and waved
        profile = rng.normal(size=(count, 3)) / [1, 2, 3] @ waves
        genes = np.zeros((count, len(self.genes)))
        genes[:, : profile.shape[1]] = profile / np.abs(profile).max(1, keepdims=True) * rng.random((count, 1))
        genes += rng.normal(size=genes.shape) * 0.5 * rng.random((count, 1))
        return genes * self.spread

    def budgets(self, genes: np.ndarray) -> np.ndarray:
        """Sparsity of every layer, (plans, layers): offsets shifted and clipped so that the mean is the target."""
        wanted = genes @ self.genes
        low, high = self.low - wanted.max(1) - 1, self.high - wanted.min(1) + 1
        for _ in range(50):
            middle = (low + high) / 2
            mean = np.clip(wanted + middle[:, None], self.low, self.high) @ self.sizes / self.sizes.sum()
            low, high = np.where(mean < self.target, middle, low), np.where(mean < self.target, high, middle)
        return np.clip(wanted + ((low + high) / 2)[:, None], self.low, self.high)

    def features(self, budgets: np.ndarray) -> np.ndarray:
        return budgets @ self.parts.T

    def budget(self, row: np.ndarray) -> Budget:
        """The same plan with the mean met to the last bit."""
        values = meet(row.tolist(), self.sizes.astype(int).tolist(), self.target, self.low, self.high)
        return Budget("sparsity", {la.name: v for la, v in zip(self.layers, values, strict=True)})


def _trees(seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor  # a second to import, and only needed here

    return GradientBoostingRegressor(n_estimators=100, learning_rate=0.1, max_depth=3, subsample=0.8, random_state=seed)


def held_out_tau(features: np.ndarray, losses: np.ndarray, seed: int) -> float:
    """Kendall's τ of predictions by trees that were fitted on other folds; 0 where there is nothing to rank."""
    folds = np.random.default_rng(seed).permutation(len(losses)) % _FOLDS
    predicted = np.zeros(len(losses))
    for fold in range(min(_FOLDS, len(losses))):
        out = folds == fold
        predicted[out] = _trees(seed).fit(features[~out], losses[~out]).predict(features[out])
    from scipy.stats import kendalltau  # slow to import, and only needed here

    tau = float(np.asarray(kendalltau(predicted, losses)[0], float))
    return tau if np.isfinite(tau) else 0.0


def evolve(
    space: Space, trees: Any, genes: np.ndarray, losses: np.ndarray, config: PredictorSearch, rng: np.random.Generator
) -> np.ndarray:
    """Genes by rising predicted loss, best ``_POPULATION``; starts from the best measured and from random plans."""
    start = np.concatenate([genes[np.argsort(losses)[: _POPULATION // 2]], space.random(_POPULATION, rng)])
    weights = np.abs(space.parts @ space.genes.T)  # how much of a feature each gene moves
    chance = trees.feature_importances_ @ (weights / weights.sum(1, keepdims=True).clip(1e-12))
    chance = 0.5 / len(chance) + 0.5 * chance / max(chance.sum(), 1e-12)
    pool = start
    cost = trees.predict(space.features(space.budgets(pool)))
    for _ in range(max(1, config.search // _POPULATION)):
        order = np.argsort(cost, kind="stable")[:_POPULATION]
        pool, cost = pool[order], cost[order]
        parents = rng.integers(0, max(2, len(pool) // 4), size=(2, _POPULATION))
        mixed = np.where(rng.random((_POPULATION, pool.shape[1])) < 0.5, pool[parents[0]], pool[parents[1]])
        moved = rng.random(mixed.shape) < chance * 3
        child = mixed + moved * rng.normal(size=mixed.shape) * 0.3 * space.spread
        pool = np.concatenate([pool, child])
        cost = np.concatenate([cost, trees.predict(space.features(space.budgets(child)))])
    return pool[np.argsort(cost, kind="stable")]


def distinct(space: Space, genes: np.ndarray, known: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` rows whose budgets differ from each other and from ``known`` by 2% of the spread on average."""
    chosen: list[int] = []
    seen = list(known)
    for i, row in enumerate(space.budgets(genes)):
        if all(np.abs(row - other).mean() > 0.02 * space.spread for other in seen):
            chosen.append(i)
            seen.append(row)
        if len(chosen) == count:
            break
    return genes[chosen]


def predictor_search(
    layers: Sequence[LayerSummary], target: float, config: PredictorSearch, measure: Measure
) -> Budget:
    """The best measured plan; ``notes``: τ, the ranking of features, losses of the uniform plan, of the samples and the verified."""
    space, rng = Space(layers, target, config), np.random.default_rng(config.seed)
    uniform = Budget("sparsity", {layer.name: target for layer in layers})
    genes = np.concatenate([np.zeros((1, len(space.genes))), space.random(max(config.plans - 1, _FOLDS), rng)])
    losses = np.array([])
    if config.spread == 0:
        return uniform

    def weigh(rows: np.ndarray, label: str) -> np.ndarray:
        out = []
        for row in space.budgets(rows):
            budget = uniform if not len(out) and not len(losses) else space.budget(row)
            out.append(measure(budget, layers, target, f"{label} {len(out) + 1}/{len(rows)}"))
        return np.array(out)

    losses = weigh(genes, "plan")
    told: dict[str, Any] = {"uniform": float(losses[0]), "sampled": losses[1:].tolist(), "rounds": []}
    for number in range(1, config.rounds + 1):
        features = space.features(space.budgets(genes))
        tau = held_out_tau(features, losses, config.seed)
        trees = _trees(config.seed).fit(features, losses)
        best = evolve(space, trees, genes, losses, config, rng)
        best = distinct(space, best, space.budgets(genes), config.verify)
        if not len(best):
            break
        predicted = trees.predict(space.features(space.budgets(best)))
        found = weigh(best, f"verify {number},")
        top = np.argsort(-trees.feature_importances_, kind="stable")[:10]
        ranking = {space.names[i]: round(float(trees.feature_importances_[i]), 4) for i in top}
        told["rounds"].append({
            "kendall_tau": tau, "ranking": ranking, "predicted": predicted.tolist(), "measured": found.tolist()
        })  # fmt: skip
        genes, losses = np.concatenate([genes, best]), np.concatenate([losses, found])
    winner = int(np.argmin(losses))
    told |= {"best": float(losses[winner]), "measured_plans": len(losses)}
    budget = uniform if winner == 0 else space.budget(space.budgets(genes[winner : winner + 1])[0])
    return Budget("sparsity", budget.values, notes=told)
