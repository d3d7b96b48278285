"""Losses of distillation, as pure functions of tensors: student first, teacher second, no gradient into the teacher.

    logits       T² · D(softmax(z_t / T), softmax(z_s / T)),   D = KL(t‖s), KL(s‖t) or Jensen-Shannon
    hidden       mean squared or cosine distance of hidden states, under a map from student to teacher layers
    attention    KL of attention distributions;  relations   KL of softmax(A Aᵀ / √d) with A = Q, K or V (MiniLMv2)

A student equal to its teacher has loss 0 and no gradient. ``mask`` (batch, tokens) leaves padding out (False).
Sources: Hinton et al. 2015 (arXiv 1503.02531); GKD's Jensen-Shannon (arXiv 2306.13649, eq. 1); PKD (1908.09355);
MiniLMv2 (2012.15828, §3). methods/04 §0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward", "reverse", "js"]
Distance = Literal["mse", "normalised", "cosine"]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` (batch, tokens) where ``mask`` is True."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp_min(1)


def next_token(logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean −log p of tokens 2 … n, nats; ``logits`` (batch, tokens, vocabulary), ``ids`` (batch, tokens)."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return masked_mean(losses.view(ids.shape[0], -1), None if mask is None else mask[:, 1:])


def divergence(
    student: Tensor,
    teacher: Tensor,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weight: float = 0.5,
) -> Tensor:
    """T² times the divergence of two sets of logits (batch, tokens, vocabulary), mean over tokens.

    ``forward`` KL(t‖s) covers the teacher's modes, ``reverse`` KL(s‖t) seeks them; ``js``: β KL(t‖M) + (1−β) KL(s‖M),
    M = β t + (1−β) s, β = ``weight``.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    log_s = torch.log_softmax(student.float() / temperature, -1)
    log_t = torch.log_softmax(teacher.detach().float() / temperature, -1)
    if kind == "forward":
        value = _kl(log_t, log_s)
    elif kind == "reverse":
        value = _kl(log_s, log_t)
    elif kind == "js":
        log_m = torch.logaddexp(log_t + _log(weight, log_t), log_s + _log(1 - weight, log_s))
        value = weight * _kl(log_t, log_m) + (1 - weight) * _kl(log_s, log_m)
    else:
        raise ValueError(f"divergence must be forward, reverse or js, not {kind!r}")
    return temperature**2 * masked_mean(value, mask)


def top_k_divergence(student: Tensor, indices: Tensor, log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(t‖s) against a cached teacher: its ``k`` largest log-probabilities (batch, tokens, k) at temperature 1.

    What the teacher gives to all other tokens is one more outcome, on both sides, so the value is a lower bound of the
    full divergence and equals it when the rest is one token.
    """
    log_s = torch.log_softmax(student.float(), -1).gather(-1, indices)
    log_s, log_t = (torch.cat((x, _rest(x)), -1) for x in (log_s, log_probs.float()))
    return masked_mean(_kl(log_t, log_s), mask)


def hidden(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    layers: Mapping[int, int],
    distance: Distance = "mse",
    mask: Tensor | None = None,
    project: Tensor | None = None,
) -> Tensor:
    """Mean distance of hidden states over ``layers`` {student layer: teacher layer}; (batch, tokens, width) each.

    ``project`` (teacher width, student width): for students of another width. ``normalised``: of vectors of length one.
    """
    total = []
    for s, t in layers.items():
        a, b = student[s], teacher[t].detach()
        if project is not None:
            a = a @ project.T
        if a.shape != b.shape:
            raise ValueError(
                f"hidden states of student {tuple(a.shape)} and teacher {tuple(b.shape)} need a projection"
            )
        if distance == "cosine":
            value = 1 - F.cosine_similarity(a, b, dim=-1)
        else:
            if distance == "normalised":
                a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
            value = (a - b).square().mean(-1)
        total.append(masked_mean(value, mask))
    return torch.stack(total).mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(t‖s) of attention maps (batch, heads, queries, keys) that sum to one over keys; mean over everything else."""
    s, t = student.clamp_min(1e-12), teacher.detach().clamp_min(1e-12)
    return (t * (t.log() - s.log())).sum(-1).mean()


def relations(student: Tensor, teacher: Tensor, heads: int | None = None) -> Tensor:
    """KL of token-to-token relations softmax(A Aᵀ / √d): ``A`` (batch, heads, tokens, d) queries, keys or values.

    ``heads``: both are cut into so many relation heads, so that neither width nor number of heads need agree.
    """
    return attention(_relation(student, heads), _relation(teacher, heads))


def uniform_map(student: int, teacher: int) -> dict[int, int]:
    """Student layer → teacher layer, evenly spaced, last on last; counts of layers."""
    return {i: round((i + 1) * teacher / student) - 1 for i in range(student)}


def last_map(student: int, teacher: int) -> dict[int, int]:
    """The last layers of the teacher, in order."""
    return {i: teacher - student + i for i in range(student)}


def _relation(A: Tensor, heads: int | None) -> Tensor:
    if heads is not None:
        A = A.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
    return torch.softmax(A @ A.transpose(-1, -2) * A.shape[-1] ** -0.5, -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log(x: float, like: Tensor) -> Tensor:
    return torch.tensor(x, dtype=like.dtype, device=like.device).log()


def _rest(log_p: Tensor) -> Tensor:
    """log of the probability that the listed outcomes leave."""
    return torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6))
