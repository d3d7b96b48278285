"""Rounding straight through: the lean function beside autograd's own of the formula in the module's docstring."""

import pytest
import torch

from lissom.core import Both, Codes, Grid, Problem, Stack, Stats
from lissom.core.grid import spread_groups
from lissom.methods.heal.legal import Legal


def rounded(weight: torch.Tensor, grid: Grid) -> Codes:
    stack = Stack(((len(weight), Both(None, grid)),))
    codes = Problem(weight, Stats.empty(weight.shape[1], gram=False), stack).project(weight).codes
    assert codes is not None
    return codes


def by_autograd(legal: Legal, latent: torch.Tensor) -> torch.Tensor:
    codes = legal.codes
    assert codes is not None
    w = latent if legal.mask is None else latent * legal.mask
    scale, zero = (spread_groups(t, w.shape[1], codes.group_size) for t in (codes.scale, codes.zero))
    top = 2.0**codes.bits - 1
    steps = torch.minimum(torch.maximum(w / scale, -zero), top - zero)
    return scale * (steps + (torch.round(steps) - steps).detach())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_values_and_gradients_are_autograds_to_the_last_bit(bits: int, symmetric: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(12, 40, generator=generator)
    mask = torch.rand(12, 40, generator=generator) > 0.5 if masked else None
    codes = rounded(weight, Grid(bits, 16, symmetric))  # the last group is shorter
    # inside, outside, and exactly on levels, the ends of the range among them
    for latent in (weight * 1.5, codes.decode(), codes.decode() * 3):
        legal, found, wanted = Legal(mask, codes), latent.clone().requires_grad_(), latent.clone().requires_grad_()
        upstream = torch.randn(12, 40, generator=generator)
        made, expected = legal.weight(found), by_autograd(legal, wanted)
        (made * upstream).sum().backward()
        (expected * upstream).sum().backward()
        assert torch.equal(made, expected)
        assert not torch.signbit(made[made == 0]).any()
        assert found.grad is not None and wanted.grad is not None
        assert torch.equal(found.grad, wanted.grad)


def test_what_waits_for_the_gradient_is_a_byte_a_weight() -> None:
    codes = rounded(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), Grid(4, 64))
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        Legal(None, codes).weight(codes.decode().requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept) <= 64 * 256 + 4 * codes.scale.numel()
