"""Losses against hand computations; a student equal to its teacher has none, and no gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.methods.heal import losses


def _logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _probabilities(row, temperature):
    e = [math.exp(float(x) / temperature) for x in row]
    return [x / sum(e) for x in e]


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_by_hand(kind, temperature):
    s, t = _logits(0, 2, 3, 5), _logits(1, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    beta, total = 0.3, 0.0
    for b, i in mask.nonzero().tolist():
        p, q = _probabilities(t[b, i], temperature), _probabilities(s[b, i], temperature)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]

        def kl(a, c):
            return sum(x * math.log(x / y) for x, y in zip(a, c, strict=True))

        total += {"forward": kl(p, q), "reverse": kl(q, p), "js": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]
    found = losses.divergence(s, t, kind, temperature, mask, beta)
    assert float(found) == pytest.approx(temperature**2 * total / 3, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["forward", "reverse", "js"]), temperature=st.floats(0.5, 5))
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(seed, kind, temperature):
    t = _logits(seed, 1, 4, 7)
    s = t.clone().requires_grad_()
    value = losses.divergence(s, t, kind, temperature)
    value.backward()
    assert abs(float(value)) < 1e-5 and float(s.grad.abs().max()) < 1e-5
    other = losses.divergence(_logits(seed + 1, 1, 4, 7), t, kind, temperature)
    assert float(other) > 0


def test_next_token_is_cross_entropy_without_padding():
    logits, ids = _logits(0, 2, 4, 6), torch.tensor([[1, 2, 3, 4], [5, 0, 1, 1]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    by_hand = [
        -math.log(_probabilities(logits[b, i - 1], 1)[int(ids[b, i])])
        for b, i in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    ]
    assert float(losses.next_token(logits, ids, mask)) == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def test_the_cached_divergence_is_a_lower_bound_that_all_candidates_make_exact():
    s, t = _logits(0, 1, 3, 8), _logits(1, 1, 3, 8)
    log_t, full = torch.log_softmax(t, -1), float(losses.divergence(s, t))
    values = []
    for k in (1, 3, 7):
        best = log_t.topk(k, -1)
        values.append(float(losses.top_k_divergence(s, best.indices, best.values)))
    assert values[0] < values[1] < values[2] == pytest.approx(full, rel=1e-4)


def test_hidden_states_under_a_layer_map():
    a, b = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)], [torch.ones(1, 2, 3) * 2, torch.ones(1, 2, 3) * 3]
    assert float(losses.hidden(a, b, {0: 1, 1: 0})) == pytest.approx((9 + 1) / 2)
    assert float(losses.hidden(a, b, {1: 1}, "normalised")) == pytest.approx(0, abs=1e-9)
    assert float(losses.hidden(a, [-x for x in b], {1: 1}, "cosine")) == pytest.approx(2)
    assert float(losses.hidden([a[1][..., :2]], b, {0: 0}, project=torch.ones(3, 2))) == pytest.approx(0)
    with pytest.raises(ValueError, match="projection"):
        losses.hidden([a[1][..., :2]], b, {0: 0})


def test_layer_maps():
    assert losses.uniform_map(3, 6) == {0: 1, 1: 3, 2: 5}
    assert losses.uniform_map(4, 4) == {i: i for i in range(4)}
    assert losses.last_map(2, 6) == {0: 4, 1: 5}


def test_attention_and_relations_by_hand():
    s, t = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[0.9, 0.1]]]])
    assert float(losses.attention(s, t)) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    A, B = _logits(0, 1, 2, 3, 4), _logits(1, 1, 2, 3, 4)
    assert float(losses.relations(A, A)) == pytest.approx(0, abs=1e-6)
    wide = _logits(2, 1, 4, 3, 6)  # other heads and widths, the same number of relation heads
    assert float(losses.relations(A, wide, heads=2)) > 0
    p, q = (torch.softmax(X[0, 1] @ X[0, 1].T / 2, -1) for X in (B, A))
    row = [
        sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))
        for a, b in zip(p, q, strict=True)
    ]
    assert float(losses.relations(A[:, 1:], B[:, 1:])) == pytest.approx(sum(row) / 3, rel=1e-4)
