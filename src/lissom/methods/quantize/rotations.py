"""QuaRot and SpinQuant: orthogonal changes of basis that leave the network's function alone and outliers nowhere to be.

    fold     norm gains go into the weights that read them, so that the bare RMS norm commutes with rotations
    R1       residual stream: embed ← embed R1;  W ← W R1 for readers (q, k, v, gate, up, head);  W ← R1ᵀ W for writers
    R2       per head between v and o:  W_v ← R2ᵀ W_v,  W_o ← W_o R2
    R3       queries and keys after RoPE, at run time (for a quantized cache): q Rᵀ-products are unchanged
    R4       before down_proj, at run time:  x ← x R4,  W_down ← W_down R4

Weights are (out, in). R1 and R2 are free at run time; R3 and R4 are run-time operators, stored as :class:`Rotation` seeds.
Layer norms need :func:`centre_writer` (and centred embeddings) first: then they are RMS norms of a centred stream.
QuaRot takes random signs times Hadamard; SpinQuant learns R1 and R2 by Cayley SGD on a loss (:func:`learn_rotation`, :mod:`.spinquant`).
Sources: Ashkboos et al., NeurIPS 2024 (arXiv 2404.00456); Liu et al., ICLR 2025 (arXiv 2405.16406), eq. 4; methods/02 §22.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...core import Orthogonal, Rotation


@dataclass(frozen=True)
class QuaRot:
    """A step: fuse rotations into the weights. ``stream``: R1; ``values``: R2; ``online``: R4, an operator of the run.

    ``seed`` of all of them.
    """

    stream: bool = True
    values: bool = True
    online: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Turns:
    """R1 (width), R2 (head size) and R4 (MLP size); None: not done."""

    stream: Rotation | Orthogonal | None
    values: Rotation | Orthogonal | None
    inner: Rotation | None


class Asked(Protocol):
    """What every step of this kind says."""

    @property
    def stream(self) -> bool: ...
    @property
    def values(self) -> bool: ...
    @property
    def online(self) -> bool: ...
    @property
    def seed(self) -> int: ...


def turns(config: Asked, width: int, head: int, inner: int) -> Turns:
    """The Hadamard rotations that ``config`` asks for."""
    return Turns(
        Rotation(width, config.seed) if config.stream else None,
        Rotation(head, config.seed + 1) if config.values else None,
        Rotation(inner, config.seed + 2) if config.online else None,
    )


READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """A reader behind a norm whose gain becomes 1."""
    return weight * gain


def centre_writer(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A writer (out, in) whose outputs have mean zero; embeddings (vocabulary, width) are centred by their transpose."""
    return weight - weight.mean(0, keepdim=True), None if bias is None else bias - bias.mean()


def rotate_reader(weight: Tensor, R: Rotation | Orthogonal) -> Tensor:
    """``W R``: reads the rotated stream x R as it read x. Embeddings (vocabulary, width) turn the same way."""
    return R.apply(weight)


def rotate_writer(weight: Tensor, R: Rotation | Orthogonal) -> Tensor:
    """``Rᵀ W``: writes the rotated stream. A bias (out,) turns by ``R.apply(bias)``."""
    return R.apply(weight.T.contiguous()).T.contiguous()


def rotate_values(v: Tensor, o: Tensor, R: Rotation | Orthogonal) -> tuple[Tensor, Tensor]:
    """R2: every head's values turn by R (head size), and the output projection turns back.

    ``v`` (kv heads · size, width), ``o`` (width, heads · size). Grouped queries share the R of their value head, and
    one R serves all heads.
    """
    size = R.size
    turned = R.apply(v.reshape(-1, size, v.shape[1]).transpose(1, 2).contiguous()).transpose(1, 2).reshape(v.shape)
    return turned.contiguous(), R.apply(o.reshape(o.shape[0], -1, size)).reshape(o.shape)


def rotate_block(
    weights: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    R1: Rotation | Orthogonal,
    R2: Rotation | Orthogonal | None = None,
    R4: Rotation | None = None,
) -> dict[str, Tensor]:
    """The weights of a block under all fused rotations.

    ``weights`` by role (q, k, v, o, gate, up, down), ``gains`` "attention" and "mlp" (1 afterwards). With R4 the run must
    rotate the input of ``down``.
    """
    out = {}
    for role in READERS:
        gain = gains["attention" if role in ("q", "k", "v") else "mlp"]
        if role in weights:
            out[role] = rotate_reader(fold_gain(weights[role], gain), R1)
    for role in WRITERS:
        out[role] = rotate_writer(weights[role], R1)
    if R2 is not None:
        out["v"], out["o"] = rotate_values(out["v"], out["o"], R2)
    if R4 is not None:
        out["down"] = R4.apply(out["down"])
    return out


def cayley_step(R: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One step downhill that stays orthogonal: ``(I + lr/2 Y)⁻¹ (I − lr/2 Y) R``, Y the skew part of the gradient."""
    G = gradient @ R.T
    G = G - 0.5 * R @ (R.T @ G)
    Y = G - G.T
    eye = torch.eye(len(R), dtype=R.dtype)
    return torch.linalg.solve(eye + lr / 2 * Y, (eye - lr / 2 * Y) @ R)


@torch.enable_grad()
def learn_rotation(
    R: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 100, lr: float = 1.5
) -> tuple[Tensor, list[float]]:
    """Cayley SGD from ``R: (n, n)`` on a differentiable ``loss(R)``; lr falls linearly to 0. Best R and all losses."""
    best, history = R, []
    for i in range(steps):
        R = R.detach().requires_grad_()
        value = loss(R)
        (gradient,) = torch.autograd.grad(value, R)
        now = float(value.detach())
        if not history or now < min(history):
            best = R.detach()
        history.append(now)
        # gradients scale with the loss: steps are measured in units of the tangent's norm
        tangent = (gradient @ R.T).detach()
        size = float((tangent - tangent.T).norm().clamp_min(1e-12))
        R = cayley_step(R.detach(), gradient / size, lr * (1 - i / steps))
    return best, history


def kurtosis(x: Tensor) -> Tensor:
    """E[x⁴]/E[x²]² over the last axis: 3 for a Gaussian, large with outliers."""
    return x.pow(4).mean(-1) / x.square().mean(-1).square().clamp_min(1e-30)
