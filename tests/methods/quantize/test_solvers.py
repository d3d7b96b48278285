"""Laws that every solver of the family obeys, whatever it stores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lissom.core import Both, Fixed, Grid, Problem, RecipeError, Stack, Stats, stored_bits
from lissom.methods.quantize import METHODS

from .problems import inputs, problem, stack

SOLVERS = [m for m in METHODS.values() if m.kind == "solver"]
_QUICK = {"autoround": {"iterations": 20}, "omniquant": {"steps": 10}}


def _solve(method, p: Problem):
    return method.run(p, method.config(**_QUICK.get(method.name, {})))


@pytest.mark.parametrize("method", SOLVERS, ids=lambda m: m.name)
@pytest.mark.parametrize("group", [16, None, 24])
def test_the_stored_form_decodes_to_the_solution_of_every_layer(method, group) -> None:
    p = stack(Both(None, Grid(3, group)))
    solved = _solve(method, p)
    form = solved.codes if solved.codes is not None else solved.stored
    assert form is not None and torch.equal(form.decode(), solved.weight)
    assert torch.isfinite(solved.weight).all() and stored_bits(form) > 0
    assert torch.allclose(solved.error, p.error(solved.weight), rtol=1e-3, atol=1e-7)
    for name, part in p.split(solved).items():
        of_layer = part.codes if part.codes is not None else part.stored
        assert of_layer is not None and torch.equal(of_layer.decode(), part.weight), name


@pytest.mark.parametrize("method", SOLVERS, ids=lambda m: m.name)
def test_zeros_of_an_earlier_step_stay_exact(method) -> None:
    mask = torch.rand(12, 32, generator=torch.Generator().manual_seed(5)) > 0.5
    p = problem(constraint=Grid(3, 16), mask=mask)
    dense = problem(constraint=Grid(3, 16))
    p = replace(p, weight=dense.weight, start=METHODS["rtn"].run(p, METHODS["rtn"].config()))
    solved = _solve(method, p)
    assert bool((solved.weight[~mask] == 0).all()) and solved.mask is not None


@pytest.mark.parametrize("method", SOLVERS, ids=lambda m: m.name)
def test_awkward_layers(method) -> None:
    """An all-zero row, a constant row, a row with an outlier of 1e4, a dead input, a width that groups do not divide."""
    W = torch.randn(5, 23) * 0.1
    W[0], W[1], W[2, 3] = 0.0, 0.25, 1e4
    X = inputs(23)
    X[:, 7] = 0.0
    p = Problem.of(W, Stats.of(X), Grid(4, 8))
    solved = _solve(method, p)
    assert torch.isfinite(solved.weight).all()
    quiet = torch.ones(5, 23, dtype=torch.bool)
    quiet[2] = False  # whatever shares a table or a rotation with the outlier may suffer, but not become NaN
    if method.name in ("rtn", "gptq", "hqq", "gptq-descent", "autoround", "omniquant", "bcq", "yaqa"):
        assert float((solved.weight - W)[[0, 1]][:, torch.arange(23) != 7].abs().max()) < 0.2


@pytest.mark.parametrize("method", [m for m in SOLVERS if m.name not in ("rtn", "gptq")], ids=lambda m: m.name)
def test_bits_are_asked_for(method) -> None:
    p = problem()
    with pytest.raises(RecipeError, match="bits"):
        method.run(
            replace(p, constraint=Stack(((12, Both(Fixed(torch.ones(12, 32, dtype=torch.bool)))),))), method.config()
        )


@pytest.mark.parametrize(
    "name", ["gptq", "awq", "autoround", "gptq-descent", "quip", "spqr", "omniquant", "bcq", "loftq", "yaqa"]
)
def test_better_than_round_to_nearest_by_output_error(name: str) -> None:
    p = problem(24, 64, Grid(3, 32))
    method = METHODS[name]
    assert _solve(method, p).error.sum() < METHODS["rtn"].run(p, METHODS["rtn"].config()).error.sum()
