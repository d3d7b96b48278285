"""SpinQuant: the rotations R1 and R2 are learned, so that what is left after rounding is least.

    minimise over orthogonal R     Σ over layers  ‖ Q_a(x R) Q_w(W R)ᵀ − x Wᵀ ‖² / ‖ x Wᵀ ‖²
    R ← (I + ½λY)⁻¹ (I − ½λY) R,   Y the skew part of the gradient        Cayley steps stay orthogonal

x: (tokens, in) inputs of some blocks on calibration text, W: (out, in) with the norm's gain in it; Q_a rounds each token, Q_w
each row, both symmetric, with gradients straight through. R1 (width) is learned on the layers that read the stream, R2 (head size, one for
all heads and blocks) on o. Both start from QuaRot's Hadamard matrices, and the best step is kept, so the loss never ends above theirs.
Source: Liu et al., ICLR 2025 (arXiv 2405.16406), eq. 4 and §3.2; methods/02 §22. Differs: the loss is the relative error of layers of
``blocks`` blocks, ``rows`` of them, not the cross entropy of the whole quantized network (one of its steps costs three forward passes of
the model; all of these together about one); R2 is shared by the blocks; writers' own rounding is not in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import Orthogonal
from .rotations import Turns, learn_rotation


@dataclass(frozen=True)
class SpinQuant:
    """``stream`` R1, ``values`` R2, ``online`` R4 (random, an operator of the run). ``bits`` of weights and ``activation_bits`` (16: not
    rounded) for which the rotations are learned; ``steps`` of rate ``lr`` falling to 0, in units of the tangent's norm; on ``tokens`` tokens of each of
    ``blocks`` blocks and ``rows`` rows of their layers. ``seed`` of the start, the rows and the tokens."""

    stream: bool = True
    values: bool = True
    online: bool = False
    bits: int = 4
    activation_bits: int = 4
    steps: int = 60
    lr: float = 1.5
    blocks: int = 8
    tokens: int = 128
    rows: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 and (2 <= self.activation_bits <= 8 or self.activation_bits == 16)):
            raise ValueError("bits must be 2 … 8, activation_bits 2 … 8 or 16")
        if min(self.steps, self.blocks, self.tokens, self.rows) < 1 or self.lr <= 0:
            raise ValueError("steps, blocks, tokens and rows must be at least 1, lr positive")


@dataclass(frozen=True)
class Seen:
    """A layer and some of its inputs: ``x`` (tokens, in), ``weight`` (out, in)."""

    x: Tensor
    weight: Tensor


def fake_rows(x: Tensor, bits: int) -> Tensor:
    """Symmetric rounding of every row of ``x``, gradients straight through the rounding (and through the scale)."""
    if bits == 16:
        return x
    top = 2.0 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    y = x / scale
    return (y + (torch.round(y) - y).detach()) * scale


def rounding_loss(R: Tensor, seen: Sequence[Seen], bits: int, activation_bits: int) -> Tensor:
    """The mean relative squared error of the layers' outputs when inputs and weights are turned by ``R`` and rounded.

    ``R``: (n, n), n a divisor of the inputs: it turns every n neighbours alike.
    """

    def turn(x: Tensor) -> Tensor:
        return (x.reshape(-1, len(R)) @ R).reshape(x.shape)

    losses = []
    for one in seen:
        y = one.x @ one.weight.T
        found = fake_rows(turn(one.x), activation_bits) @ fake_rows(turn(one.weight), bits).T
        losses.append((found - y).square().sum() / y.square().sum().clamp_min(1e-30))
    return torch.stack(losses).mean()


def spin(
    start: Turns, stream: Sequence[Seen], values: Sequence[Seen], config: SpinQuant
) -> tuple[Turns, dict[str, float]]:
    """The turns with R1 and R2 learned from ``start``; notes: the losses with its rotations and with the learned ones."""
    notes: dict[str, float] = {}
    out = {}
    for name, R, seen in (("stream", start.stream, stream), ("values", start.values, values)):
        out[name] = R
        if R is None or not seen:
            continue
        learned, history = learn_rotation(
            R.matrix(),
            lambda Q, seen=seen: rounding_loss(Q, seen, config.bits, config.activation_bits),
            config.steps,
            config.lr,
        )
        u, _, vt = torch.linalg.svd(learned.double())  # rounding of the steps adds up; the nearest orthogonal matrix
        out[name] = Orthogonal((u @ vt).float())
        notes |= {f"{name}_loss_of_hadamard": history[0], f"{name}_loss": min(history)}
    return Turns(out["stream"], out["values"], start.inner), notes
