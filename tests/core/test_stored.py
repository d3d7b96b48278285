"""Forms of storage decode to what was solved, by rows too, and orthogonal matrices are orthogonal."""

from __future__ import annotations

import pytest
import torch

from lissom.core import Codes, Columns, Grid, Patched, Problem, Rotated, Rotation, Scaled, Stacked, Stats, stored_bits
from lissom.core.stored import Affine


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("size", [1, 2, 7, 9, 48, 64, 576])
def test_rotation_is_orthogonal_and_undone(size: int, kind: str) -> None:
    R = Rotation(size, 3, kind)  # type: ignore[arg-type]
    Q, x = R.matrix(), torch.randn(5, size)
    assert torch.allclose(Q.T @ Q, torch.eye(size), atol=1e-5)
    assert torch.allclose(R.apply(x), x @ Q, atol=1e-5)
    assert torch.allclose(R.undo(R.apply(x)), x, atol=1e-5)
    if size > 2:
        assert not torch.equal(Rotation(size, 4, kind).matrix(), Q)  # type: ignore[arg-type]


def test_hadamard_rotation_is_as_flat_as_its_odd_part_allows() -> None:
    assert float(Rotation(64, 0).matrix().abs().max()) == pytest.approx(1 / 8)
    assert float(Rotation(576, 0).matrix().abs().max()) <= 2**0.5 / 24 + 1e-6


def _codes(rows: int = 6, columns: int = 16) -> Codes:
    W = torch.randn(rows, columns)
    grid = Grid(4, 8)
    return Codes.round(W, grid.fit_all(W), 4, 8)


def test_nested_forms_decode_by_rows() -> None:
    codes, W = _codes(), torch.randn(6, 16)
    chosen = torch.zeros(6, 16, dtype=torch.bool)
    chosen[1, 3] = chosen[4, 0] = True
    form = Scaled(Patched.where(codes, chosen, W), torch.rand(16) + 0.5)
    whole = form.decode()
    assert whole[4, 0] == W[4, 0].half().float() * form.factor[0]
    assert torch.equal(form.rows(2, 6).decode(), whole[2:6])
    columns = Columns(codes, torch.tensor([2, 5]), W[:, [2, 5]].half().float())
    assert torch.equal(columns.decode()[:, 5], W[:, 5].half().float())
    assert torch.equal(columns.rows(1, 4).decode(), columns.decode()[1:4])


def test_rotated_form_is_the_matrix_product() -> None:
    W = torch.randn(6, 16)
    L, R = Rotation(6, 1, "orthogonal"), Rotation(16, 2)
    turned = Rotated.forward(W, L, R)
    assert torch.allclose(turned, L.matrix().T @ W @ R.matrix(), atol=1e-5)
    base = Affine(torch.zeros(6, 16, dtype=torch.uint8), torch.ones(6, 1), torch.ones(6, 1), 2, 16)
    want = L.matrix() @ torch.ones(6, 16) @ R.matrix().T
    assert torch.allclose(Rotated(base, L, R).decode(), want, atol=1e-5)
    with pytest.raises(ValueError, match="mixed"):
        Rotated(base, L, R).rows(0, 3)


def test_stack_gives_back_its_layers_only_whole() -> None:
    a, b = _codes(2), _codes(4)
    stack = Stacked(((2, a), (4, b)))
    assert stack.rows(2, 6) is b
    assert torch.equal(stack.decode(), torch.cat([a.decode(), b.decode()]))
    with pytest.raises(ValueError, match="not one layer"):
        stack.rows(1, 3)


def test_sizes_by_hand() -> None:
    codes = _codes()  # 96 codes of 4 bits, 12 groups with a scale and a 4-bit zero point
    assert stored_bits(codes) == 96 * 4 + 12 * (16 + 4)
    chosen = torch.zeros(6, 16, dtype=torch.bool)
    chosen[0, 0] = True
    assert stored_bits(Patched.where(codes, chosen, torch.zeros(6, 16))) == stored_bits(codes) + 32


def test_solution_of_a_layer_keeps_its_form() -> None:
    problem = Problem.of(torch.randn(6, 16), Stats.of(torch.randn(40, 16)), Grid(4, 8))
    from lissom.core import Solved

    form = Scaled(_codes(), torch.full((16,), 2.0))
    solved = Solved(form.decode(), None, None, problem.error(form.decode()), {}, form)
    part = solved.part(slice(1, 3), 4)
    assert part.stored is not None and torch.equal(part.stored.decode(), part.weight)
