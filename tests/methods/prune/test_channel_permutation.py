"""Channel permutation: orders stay within their segments, never retain less, and are near the best of all by brute force."""

import itertools
import math

import pytest
import torch

from lissom.core import Stats
from lissom.methods.prune.channel_permutation import ChannelPermutation, channel_permutation
from lissom.methods.prune.e_sparse import SEQUENCE
from lissom.methods.prune.permute import retained, zigzag
from lissom.methods.prune.ria import ria_score


def layer(rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    strong = torch.arange(columns) < columns // 2  # the worst order: strong channels sit together
    return torch.randn(rows, columns, generator=g) * torch.where(strong, 3.0, 0.3), torch.rand(
        columns, generator=g
    ) + 0.5


def seen(norm, entropy=None):
    """Statistics of one token with these norms."""
    return Stats(1, norm, norm.square(), norm, None, entropy)


@pytest.mark.parametrize("search", ["zigzag", "assign", "swap"])
@pytest.mark.parametrize("segments", [1, 4])
def test_orders_stay_in_their_segments_and_retain_more(search, segments):
    W, norm = layer(12, 64)
    order, before, after = channel_permutation(
        W, seen(norm), torch.arange(64)[:, None], segments, 2, 4, ChannelPermutation(search=search)
    )
    own = order.reshape(segments, -1)
    assert torch.equal(own.sort(1).values.reshape(-1), torch.arange(64))
    score = ria_score(W, norm, 0.5)
    assert before == pytest.approx(retained(score, 2, 4) / float(score.sum()), rel=1e-5)
    assert after == pytest.approx(retained(score[:, order], 2, 4) / float(score.sum()), rel=1e-5)
    assert after >= before
    if segments == 1:
        assert after > before


def test_near_the_best_of_all_orders():
    W, norm = layer(3, 8, seed=2)
    score = ria_score(W, norm, 0.5)
    best = 0.0
    for group in itertools.combinations(range(8), 4):
        rest = [c for c in range(8) if c not in group]
        best = max(best, retained(score[:, [*group, *rest]], 2, 4))
    _, before, after = channel_permutation(
        W, seen(norm), torch.arange(8)[:, None], 1, 2, 4, ChannelPermutation(rounds=4)
    )
    share = best / float(score.sum())
    assert before < after <= share + 1e-6
    assert after - before > 0.6 * (share - before)


def test_a_channel_read_by_several_columns_counts_them_all():
    """Two readers of one channel are the same as two rows that read it."""
    W, norm = layer(6, 16)
    both = torch.cat((W, W.flip(0)), 1)
    columns = torch.stack((torch.arange(16), torch.arange(16) + 16), 1)
    order, before, after = channel_permutation(both, seen(norm.repeat(2)), columns, 1, 2, 4, ChannelPermutation())
    score = ria_score(both, norm.repeat(2), 0.5)
    rows = torch.cat((score[:, :16], score[:, 16:]))
    assert after == pytest.approx(retained(rows[:, order], 2, 4) / float(rows.sum()), rel=1e-5)
    assert after > before


def test_e_sparse_shuffles_retain_more_of_its_own_score():
    """Global deal and local swaps, on |w| times entropy and norm."""
    W, norm = layer(12, 64)
    entropy = torch.linspace(0.1, 3, 64)
    config = ChannelPermutation(search="swap", score="e-sparse", alpha=0.5 / math.sqrt(SEQUENCE), block=16)
    order, before, after = channel_permutation(W, seen(norm, entropy), torch.arange(64)[:, None], 1, 2, 4, config)
    score = W.abs() * (entropy + 0.5 * norm)
    assert before == pytest.approx(retained(score, 2, 4) / float(score.sum()), rel=1e-5)
    assert after == pytest.approx(retained(score[:, order], 2, 4) / float(score.sum()), rel=1e-5)
    assert after > before and after * float(score.sum()) >= retained(score[:, zigzag(score, 4)], 2, 4)
