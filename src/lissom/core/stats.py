"""Statistics of the inputs of a linear layer, gathered batch by batch.

``X: (tokens, in)``. Adding up two batches, two files or two ranks of a cluster is :func:`merge`; a stream of batches goes
through a :class:`Tally`, which needs no fresh memory for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCKS, _LEAST = 8, 96  # rows of blocks of a Gram matrix, and the fewest columns of a block
_ROWS = 512  # tokens whose magnitudes are looked at together: a small buffer is used again and again


def add_gram(G: Tensor, X: Tensor) -> None:
    """``G += Xᵀ X`` in the upper triangle of ``G: (in, in)``, in place; what stands below the diagonal has no meaning.

    torch has no symmetric rank-k update: each row of blocks is one product with the columns from there on, 9/16 of the full one.
    numpy hands the product to BLAS ``syrk``, which is faster on one thread (99 against 124 ms for 4096 × 1536) but slower on two
    (80 against 73), and its threads keep a core for some time afterwards: the next product of torch then takes 199 ms instead of 122.
    """
    width = X.shape[1]
    block = max(_LEAST, -(-width // _BLOCKS))
    for a in range(0, width, block):
        G[a : a + block, a:].addmm_(X[:, a : a + block].T, X[:, a:])


def mirrored(G: Tensor) -> Tensor:
    """The upper triangle copied below the diagonal, in place."""
    for a in range(0, len(G), _LEAST):
        b = a + _LEAST
        corner = G[a:b, a:b]
        corner.copy_(corner.triu() + corner.triu(1).T)
        G[b:, a:b] = G[a:b, b:].T
    return G


def gram_product(X: Tensor) -> Tensor:
    """``Xᵀ X``, shape (in, in), exactly symmetric."""
    G = X.new_zeros(X.shape[1], X.shape[1])
    add_gram(G, X)
    return mirrored(G)


@dataclass(frozen=True)
class Stats:
    """Sums over the tokens seen so far.

    Shapes: ``sum``, ``sumsq``, ``absmax``: (in,); ``gram``: (in, in) or None when no method needs it.
    ``gram`` is the plain sum ``Σ x xᵀ``; the layer Hessian of the papers is :attr:`hessian`. ``entropy`` (in,): see
    :func:`histogram_entropy`; ``cross`` (in, in): ``Σ y xᵀ`` with what the layer reads in the dense model, y. Both are of a whole set
    of tokens only, so merging drops them.
    """

    count: int
    sum: Tensor
    sumsq: Tensor
    absmax: Tensor
    gram: Tensor | None = None
    entropy: Tensor | None = None
    cross: Tensor | None = None

    @classmethod
    def empty(
        cls, width: int, gram: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Stats:
        zero = torch.zeros(3, width, dtype=dtype, device=device)
        square = torch.zeros(width, width, dtype=dtype, device=device) if gram else None
        return cls(0, zero[0], zero[1], zero[2], square)

    @classmethod
    def white(cls, width: int, gram: bool = True, device: torch.device | None = None) -> Stats:
        """Of inputs about which nothing is known: mean 0, variance 1, uncorrelated."""
        one = torch.ones(width, device=device)
        return cls(1, torch.zeros_like(one), one, one, torch.eye(width, device=device) if gram else None)

    @classmethod
    def of(cls, X: Tensor, gram: bool = True) -> Stats:
        """Statistics of one batch ``X: (tokens, in)``."""
        tally = Tally(X.shape[-1], gram, X.dtype, X.device)
        tally.add(X)
        return tally.stats()

    @property
    def width(self) -> int:
        return self.sum.shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x] per input, (in,)."""
        return self.sum / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """Var[x] per input, (in,), never negative."""
        return (self.sumsq / max(self.count, 1) - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """‖X_c‖₂ of each input column over all tokens, (in,)."""
        return self.sumsq.clamp_min(0).sqrt()

    @property
    def hessian(self) -> Tensor:
        """``H = (2/count) Σ x xᵀ``, (in, in): the Hessian of the mean squared output error of one row."""
        if self.gram is None:
            raise ValueError("these statistics were gathered without a Gram matrix")
        return self.gram * (2.0 / max(self.count, 1))


class Tally:
    """Running sums of batches, in place.

    Fresh memory for a Gram matrix or for the magnitudes of a batch costs more than the arithmetic: the system clears every page.
    """

    def __init__(
        self, width: int, gram: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ):
        self._sums = Stats.empty(width, gram, dtype, device)

    def add(self, X: Tensor, weights: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Count the tokens of ``X: (…, in)``; ``weights`` (tokens,), of mean 1 over all that is counted, in every sum of them.

        ``dense``: of X's shape, for ``cross``; of all batches or of none.
        """
        s = self._sums
        X = X.reshape(-1, X.shape[-1]).to(s.sum.dtype)
        if not len(X):
            return
        magnitudes = X.new_empty(min(_ROWS, len(X)), X.shape[1])
        for part in X.split(_ROWS):
            torch.maximum(s.absmax, torch.abs(part, out=magnitudes[: len(part)]).amax(0), out=s.absmax)
        if weights is None:
            s.sum.add_(X.sum(0))
        else:
            weights = weights.to(X)
            s.sum.addmv_(X.T, weights)
        if dense is not None and s.gram is not None:
            Y = dense.reshape(X.shape).to(X)
            if s.cross is None:
                s = replace(s, cross=torch.zeros_like(s.gram))
            assert s.cross is not None
            s.cross.addmm_((Y if weights is None else Y * weights[:, None]).T, X)
        if weights is not None:
            X = X * weights.sqrt()[:, None]
        if s.gram is None:
            s.sumsq.add_(X.square().sum(0))
        else:
            add_gram(s.gram, X)
        self._sums = replace(s, count=s.count + len(X))

    def stats(self) -> Stats:
        """The sums so far; they are handed over, add nothing afterwards."""
        s = self._sums
        return s if s.gram is None else replace(s, gram=mirrored(s.gram), sumsq=s.gram.diagonal().clone())


def merge(a: Stats, b: Stats) -> Stats:
    """Statistics of the union of two sets of tokens; associative and commutative."""
    if a.width != b.width or (a.gram is None) != (b.gram is None):
        raise ValueError(f"cannot merge statistics of widths {a.width} and {b.width}")
    gram = None if a.gram is None or b.gram is None else a.gram + b.gram
    return Stats(a.count + b.count, a.sum + b.sum, a.sumsq + b.sumsq, torch.maximum(a.absmax, b.absmax), gram)


def histogram_entropy(batches: Callable[[], Iterable[Tensor]], bins: int) -> Tensor:
    """Entropy in nats of each input's histogram of ``bins`` bins over its own range, (in,).

    ``batches`` gives the inputs, (tokens, in) each, and is called three times: for the ends of the ranges and for the counts.
    """
    low = torch.stack([x.amin(0) for x in batches()]).amin(0)
    high = torch.stack([x.amax(0) for x in batches()]).amax(0)
    width = ((high - low) / bins).clamp_min(1e-30)
    counts = low.new_zeros(len(low), bins)
    for x in batches():
        index = ((x - low) / width).long().clamp_(0, bins - 1).T
        counts.scatter_add_(1, index, low.new_ones(index.shape))
    p = counts / counts.sum(1, keepdim=True)
    return -(p * p.clamp_min(1e-30).log()).sum(1)
