"""One threshold over all layers, against one sort of all scores."""

import pytest
import torch

from lissom.core import Both, LayerSummary, Problem, Sparse, Stack, Stats
from lissom.methods.allocate.global_threshold import GlobalThreshold, global_threshold, summarise
from lissom.methods.prune import METHODS


def problems(unit=(1, 1), scales=(1.0, 0.5, 3.0), heavy=True):
    g = torch.Generator().manual_seed(0)
    out = []
    for i, scale in enumerate(scales):
        W = scale * torch.randn(40, 32 * (3 - i), generator=g)  # sums and means of units rank differently
        W = W**3 if heavy and i == 1 else W
        stack = Stack(((24, Both(Sparse(0.6, unit=unit))), (16, Both(Sparse(0.6, unit=unit)))))
        problem = Problem(W, Stats.white(W.shape[1], gram=False), stack, (f"{i}a", f"{i}b"))
        score = METHODS["magnitude"].score(problem, METHODS["magnitude"].config())
        out.append(Problem(W, problem.stats, stack, problem.names, extras={"score": score}))
    return out


def budget(made, target, config=GlobalThreshold()):  # noqa: B008  (frozen)
    layers = []
    for block, problem in enumerate(made):
        values = summarise([problem], target, config)
        for name, (rows, _), v in zip(problem.names, problem.constraint.parts, values, strict=True):
            layers.append(LayerSummary(name, block, "q", rows, problem.weight.shape[1], v))
    return layers, global_threshold(layers, target, config)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("unit", [(1, 1), (1, 16), (1, 0)])
def test_budgets_are_what_one_sort_of_all_scores_gives(target, unit):
    made = problems(unit)
    layers, got = budget(made, target, GlobalThreshold(most=0.999))
    costs, owner = [], []  # a unit's cost per weight; its layer, once for every weight
    for problem in made:
        for name, (rows, part) in zip(problem.names, problem.constraint.slices(), strict=True):
            score = problem.extras["score"][rows]
            cost = part.pattern.units(score).flatten() / (score.numel() / part.pattern.units(score).numel())
            costs.append(cost.repeat_interleave(score.numel() // len(cost)))
            owner += [name] * score.numel()
    order = torch.cat(costs).argsort(stable=True)[: round(target * len(owner))].tolist()
    for layer in layers:
        exact = sum(owner[i] == layer.name for i in order) / layer.size
        units = layer.size // (1 if unit == (1, 1) else 16 if unit == (1, 16) else layer.columns)
        assert got.values[layer.name] == pytest.approx(exact, abs=0.01 + 1 / units)
    assert got.mean(layers) == pytest.approx(target, abs=1e-9)
    assert max(got.values.values()) - min(got.values.values()) > 0.2


def test_no_layer_loses_more_than_it_may():
    layers, got = budget(problems(scales=(1.0, 1e-3, 1.0), heavy=False), 0.5, GlobalThreshold(most=0.7))
    assert max(got.values.values()) == pytest.approx(0.7) and got.mean(layers) == pytest.approx(0.5)
