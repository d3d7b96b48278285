"""Laws of the vocabulary: statistics merge, patterns count, grids project."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.core import (
    NM,
    Both,
    Codes,
    Grid,
    NumericalError,
    Problem,
    Sparse,
    Stats,
    Tally,
    gram_product,
    keep_largest,
    merge,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 700))
def test_merging_equals_one_shot_and_is_associative(a, b, c, width):
    X = torch.randn(a + b + c, width, dtype=torch.float64)
    whole = Stats.of(X)
    x, y, z = (Stats.of(part) for part in X.split([a, b, c]))
    tally = Tally(width, dtype=torch.float64)
    for part in X[None].split([a, b, c], 1):
        tally.add(part)
    for merged in (merge(merge(x, y), z), merge(x, merge(y, z)), tally.stats()):
        assert merged.count == whole.count
        for field in ("sum", "sumsq", "absmax", "gram"):
            assert torch.allclose(getattr(merged, field), getattr(whole, field))
    assert torch.allclose(whole.gram, X.T @ X)
    assert torch.allclose(whole.mean, X.mean(0))
    assert torch.allclose(whole.variance, X.var(0, unbiased=False), atol=1e-9)
    assert torch.allclose(whole.norm, X.norm(dim=0))
    assert torch.equal(whole.absmax, X.abs().amax(0))


def test_the_symmetric_product_is_exactly_symmetric():
    X = torch.randn(50, 701)
    G = gram_product(X)
    assert torch.equal(G, G.T)
    assert torch.allclose(G, X.T @ X, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 50), st.floats(0, 0.999), st.booleans())
def test_unstructured_counts_are_exact_even_with_ties(rows, columns, p, by_row):
    score = torch.randint(0, 3, (rows, columns)).float()
    keep = Sparse(p, "row" if by_row else "layer").select(score)
    if by_row:
        assert ((~keep).sum(1) == round(p * columns)).all()
    else:
        assert int((~keep).sum()) == round(p * rows * columns)
    if (~keep).any() and keep.any() and not by_row:
        assert score[~keep].max() <= score[keep].min()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 6), st.integers(1, 5))
def test_every_group_keeps_n_of_m(n, m, rows, groups):
    n, m = min(n, m), max(n, m)
    score = torch.rand(rows, groups * m)
    keep = NM(n, m).select(score).reshape(rows, groups, m)
    assert (keep.sum(2) == n).all()
    best = score.reshape(rows, groups, m).topk(n, 2).values.sum()
    assert torch.isclose((score.reshape(rows, groups, m) * keep).sum(), best)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 8), st.sampled_from([None, 8, 16, 24]), st.booleans(), st.sampled_from(["minmax", "mse"]),
    st.integers(0, 10_000), st.floats(-4, 3),
)  # fmt: skip
def test_grids(bits, group, symmetric, kind, seed, magnitude):
    """Zero is exact, levels are few, rounding is idempotent and errs by half a step at most inside the range."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 40, generator=g) * 10**magnitude
    w[:, ::7] = 0
    w[2] = 0
    grid = Grid(bits, group, symmetric, kind)
    params = grid.fit_all(w)
    codes = Codes.round(w, params, bits, group)
    decoded = codes.decode()
    assert (decoded[w == 0] == 0).all()
    assert torch.equal(Codes.round(decoded, params, bits, group).values, codes.values)
    assert int(codes.values.max()) < 2**bits
    assert codes.symmetric or not symmetric
    if kind == "minmax":
        step = params.scale.repeat_interleave(group or 40, 1)[:, :40]
        # half a step, and the rounding of the scale to fp16 at the far end of the range
        assert ((decoded - w).abs() <= step * (0.5 + 2**bits * 2**-10) + 1e-7).all()


def test_hand_computed_grid():
    w = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    params = Grid(2, None).fit_all(w)
    assert params.scale.item() == 1.0 and params.zero.item() == 1
    assert Codes.round(w, params, 2).values.tolist() == [[0, 1, 1, 3]]


def test_the_search_for_a_range_never_does_worse_in_its_norm():
    w = torch.randn(20, 64) ** 3
    errors = {}
    for kind in ("minmax", "mse"):
        errors[kind] = (Grid(3, None, range=kind).project(w) - w).abs().pow(2.4).sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()


def test_scales_that_overflow_are_refused():
    with pytest.raises(NumericalError, match="half precision"):
        Grid(2, None).fit_all(torch.tensor([[1e9, -1e9]]))


def test_outliers_of_1e4_keep_the_rest_finite():
    w = torch.randn(4, 64)
    w[0, 0] = 1e4
    assert torch.isfinite(Grid(4, 32).project(w)).all()


@pytest.mark.parametrize("constraint", [Sparse(0.5), NM(2, 4), Both(NM(1, 4), None)], ids=str)
def test_projection_is_idempotent(constraint):
    w = torch.randn(6, 32)
    problem = Problem.of(w, Stats.of(torch.randn(10, 32)), constraint)
    once = problem.constraint.project(w)
    assert torch.equal(problem.constraint.project(once), once)


def test_bad_words_are_refused():
    for make in (
        lambda: Sparse(1.0),
        lambda: Sparse(-0.1),
        lambda: NM(5, 4),
        lambda: NM(1, 33),
        lambda: Grid(9),
        lambda: Grid(1),
    ):
        with pytest.raises(ValueError):
            make()


def test_keep_largest_at_the_ends():
    score = torch.rand(3, 7)
    assert keep_largest(score, 0).all() and not keep_largest(score, 7).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 97), (5, 32), (40, 4)])
def test_keep_largest_is_a_stable_sort_and_a_cut(shape, dtype):
    """Ties, of which whole numbers have many, are dropped from the left."""
    score = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for drop in (1, shape[1] // 2, shape[1] - 1):
        expected = torch.ones(shape, dtype=torch.bool)
        expected.scatter_(1, score.float().argsort(dim=1, stable=True)[:, :drop], False)
        assert torch.equal(keep_largest(score, drop), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1 << 16, 1 << 17),
    st.floats(0, 1),
    st.sampled_from(["normal", "ties", "sorted", "few", "nan", "far"]),
    st.integers(0, 99),
)
def test_exact_counts_of_many_entries(n, p, kind, seed):
    """Long rows take their threshold from a sample first, whatever the values are."""
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(1, n, generator=g).abs()
    if kind == "ties":
        score = (score * 3).round()
    elif kind == "sorted":
        score = score.sort(1).values
    elif kind == "few":
        score[:, n // 10 :] = 0
    elif kind == "nan":
        score[:, 5] = float("nan")
    elif kind == "far":
        score[:, :: n // (1 << 14)] += 100  # every entry that the sample sees
    drop = min(n - 1, round(p * n))
    keep = keep_largest(score, drop)
    if kind == "nan":
        return  # no order, but no crash
    assert int(keep.count_nonzero()) == n - drop
    if 0 < drop:
        assert score[keep].min() >= score[~keep].max()


@pytest.mark.parametrize("gram", [True, False])
def test_weighted_tokens_count_in_every_sum(gram):
    g = torch.Generator().manual_seed(0)
    X, w = torch.randn(50, 6, generator=g, dtype=torch.float64), torch.rand(50, generator=g, dtype=torch.float64)
    tally = Tally(6, gram, torch.float64)
    tally.add(X[:20].view(4, 5, 6), w[:20])
    tally.add(X[20:], w[20:])
    stats = tally.stats()
    torch.testing.assert_close(stats.sum, sum(wi * x for wi, x in zip(w, X, strict=True)))
    torch.testing.assert_close(stats.sumsq, sum(wi * x * x for wi, x in zip(w, X, strict=True)))
    torch.testing.assert_close(stats.absmax, X.abs().amax(0))
    assert stats.count == 50
    if gram:
        torch.testing.assert_close(stats.gram, sum(wi * torch.outer(x, x) for wi, x in zip(w, X, strict=True)))
