"""Weight-and-activation methods, rotations and caches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lissom.core import BlockProblem, Both, Codes, Grid, Problem, RecipeError, Rotation, Sparse, Stack, Stats
from lissom.methods.quantize import METHODS, kv_cache, rotations, spinquant
from lissom.methods.quantize.autoround import AutoRound, autoround
from lissom.methods.quantize.llm_int8 import LLMInt8, llm_int8, mixed_product
from lissom.methods.quantize.omniquant import OmniQuant, omniquant
from lissom.methods.quantize.smoothquant import SmoothQuant, fold_into_linear, fold_into_norm, smooth_scale, smoothquant
from lissom.methods.quantize.vs_quant import VSQuant, fake_vectors, vector_quantize
from lissom.methods.quantize.zeroquant import ZeroQuant, distil_layer, token_wise_linear, zeroquant

from .problems import inputs, problem


def test_smoothing_leaves_the_function_alone_and_flattens_activations() -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 16, generator=g), torch.randn(8, 16, generator=g)
    gain, bias = torch.rand(16, generator=g) + 0.5, torch.randn(16, generator=g)
    gain[3] = 40.0
    y = F.layer_norm(x, (16,), gain, bias)
    s = smooth_scale(y.abs().amax(0), W, 0.5)
    folded = F.layer_norm(x, (16,), *fold_into_norm(gain, bias, s))
    assert torch.allclose(folded @ (W * s).T, y @ W.T, atol=1e-3)
    assert torch.allclose(folded.abs().amax(0), (W * s).abs().amax(0), rtol=2e-2)  # α = ½ makes both equal
    before, b = torch.randn(16, 5, generator=g), torch.randn(16, generator=g)
    W2, b2 = fold_into_linear(before, b, s)
    z = torch.randn(7, 5, generator=g)
    assert torch.allclose((z @ W2.T + b2) * s, z @ before.T + b, atol=1e-4)
    solved = smoothquant(problem(constraint=Grid(8, None, symmetric=True)), SmoothQuant())
    assert solved.notes["activation_peak_smooth"] < solved.notes["activation_peak"]


def test_smoothing_by_the_root_mean_square_forgets_a_single_token() -> None:
    g = torch.Generator().manual_seed(4)
    x, W = torch.randn(400, 8, generator=g), torch.randn(6, 8, generator=g)
    x[0, 5] = 1000.0
    p = Problem(W, Stats.of(x), Stack(((6, Both(None, Grid(8, None, True))),)), ("l",))
    s, _ = METHODS["smoothquant"].fold(p, SmoothQuant(0.5, "rms"))  # type: ignore[misc]
    rms = torch.stack([torch.tensor([float(v) ** 2 for v in x[:, j]]).mean().sqrt() for j in range(8)])
    assert torch.allclose(s, (rms / W.abs().amax(0)).sqrt(), rtol=1e-3)
    peak, _ = METHODS["smoothquant"].fold(p, SmoothQuant(0.5))  # type: ignore[misc]
    assert peak[5] > 3 * s[5]


@pytest.mark.parametrize("statistic", ["absmax", "rms"])
def test_searched_smoothing_is_the_best_of_a_loop_and_respects_owners(statistic: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, W = torch.randn(40, 12, generator=g), torch.randn(20, 12, generator=g)
    x[:, 2] *= 40
    x[:, 9] *= 12
    owner = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    grid = Grid(8, None, True)
    p = Problem(W, Stats.of(x), Stack(((20, Both(None, grid)),)), ("l",), extras={"sample": x, "owner": owner})
    s, notes = METHODS["smoothquant"].fold(p, SmoothQuant("search", statistic))  # type: ignore[misc,arg-type]
    wide = x.abs().amax(0) if statistic == "absmax" else x.square().mean(0).sqrt()
    y, errors = x @ W.T, {}
    for alpha in (0.0, *(i / 20 for i in range(2, 20))):
        f = smooth_scale(wide, W, alpha) if alpha else torch.ones(12)
        f = (f.view(2, 6).log().mean(0).exp().repeat(2)).half().float() if alpha else f
        step = (x / f).abs().amax(1, keepdim=True) / 127.5
        rounded = torch.round(x / f / step).clamp(-128, 127) * step @ grid.project(W * f).T
        errors[alpha] = float(((rounded - y).square().sum(1) / y.square().sum(1)).mean())
    assert notes["alpha"] == min(errors, key=lambda a: errors[a]) and notes["alpha"] > 0
    assert (
        notes["error"] == pytest.approx(min(errors.values()), rel=1e-3)
        and notes["error"] < notes["error_unsmoothed"] / 2
    )
    assert torch.equal(s[:6], s[6:])
    with pytest.raises(RecipeError, match="fold"):
        smoothquant(p, SmoothQuant("search"))


def test_int8_with_outliers_between_its_two_limits() -> None:
    X, W = inputs(24), torch.randn(6, 24)
    exact = X @ W.T
    errors = [float((mixed_product(X, W, t) - exact).square().mean()) for t in (0.0, 6.0, math.inf)]
    assert errors[0] < errors[1] < errors[2]
    p = Problem.of(W, Stats.of(X), Grid(8, None, symmetric=True))
    few = llm_int8(p, LLMInt8())
    assert 0 < few.notes["outlier_inputs"] < 1
    rtn = METHODS["rtn"].run(p, METHODS["rtn"].config())
    assert torch.equal(llm_int8(p, LLMInt8(math.inf)).weight, rtn.weight)
    assert few.error.sum() < rtn.error.sum()


def test_vector_scales_reach_one_level_and_shorter_vectors_are_better() -> None:
    W = torch.randn(8, 128)

    def error(group: int, config: VSQuant) -> float:
        return float((vector_quantize(W, 4, group, config).decode() - W).square().sum())

    fine = VSQuant(8)
    assert error(16, fine) < error(64, fine) < error(128, fine)
    # the unquantized scales, one level
    view = W.reshape(-1, 16)
    s = view.abs().amax(1, keepdim=True) / 7
    one = float((torch.round(view / s) * s - view).square().sum())
    assert error(16, fine) == pytest.approx(one, rel=0.02)
    form = vector_quantize(W, 4, 16, VSQuant(4, ceil=True))
    assert bool((form.scale.decode() >= W.reshape(8, 8, 16).abs().amax(2) / 7 * 0.999).all())
    assert form.size == 8 * 128 * 4 + 8 * 8 * 4 + 8 * 16
    assert torch.allclose(fake_vectors(W, 8, 16, VSQuant(8)), W, atol=0.05)


def test_learned_clipping_never_loses_to_the_range_it_starts_from() -> None:
    p = problem(constraint=Grid(2, 16))
    rtn = METHODS["rtn"].run(p, METHODS["rtn"].config())
    assert torch.equal(omniquant(p, OmniQuant(steps=0)).weight, rtn.weight)
    solved = omniquant(p, OmniQuant(steps=40))
    assert bool((solved.error <= rtn.error + 1e-7).all()) and solved.error.sum() < 0.9 * rtn.error.sum()


def test_gradient_solvers_run_where_gradients_are_off() -> None:
    p = problem()
    with torch.no_grad():
        for solved in (autoround(p, AutoRound(5)), omniquant(p, OmniQuant(5))):
            assert not solved.weight.requires_grad


def _attend(x: Tensor, w: dict[str, Tensor], gains: dict[str, Tensor], r4: Rotation | None = None) -> Tensor:
    """A llama-like block without positions: 4 heads of size 4, 2 of keys and values."""

    def norm(h: Tensor, gain: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * gain

    h = norm(x, gains["attention"])
    q, k, v = ((h @ w[r].T).unflatten(-1, (-1, 4)).transpose(0, 1) for r in ("q", "k", "v"))
    k, v = (t.repeat_interleave(2, 0) for t in (k, v))
    c = ((q @ k.transpose(1, 2) / 2).softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + c @ w["o"].T
    h = norm(x, gains["mlp"])
    u = F.silu(h @ w["gate"].T) * (h @ w["up"].T)
    return x + (r4.apply(u) if r4 else u) @ w["down"].T


def test_fused_rotations_leave_the_block_alone() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "q": (16, 16),
        "k": (8, 16),
        "v": (8, 16),
        "o": (16, 16),
        "gate": (24, 16),
        "up": (24, 16),
        "down": (16, 24),
    }
    w = {r: torch.randn(*s, generator=g) * 0.3 for r, s in shapes.items()}
    gains = {"attention": torch.rand(16, generator=g) + 0.5, "mlp": torch.rand(16, generator=g) + 0.5}
    x = torch.randn(6, 16, generator=g)
    R1, R2, R4 = Rotation(16, 1), Rotation(4, 2), Rotation(24, 3)
    turned = rotations.rotate_block(w, gains, R1, R2, R4)
    ones = {k: torch.ones(16) for k in gains}
    assert torch.allclose(R1.undo(_attend(R1.apply(x), turned, ones, R4)), _attend(x, w, gains), atol=1e-4)
    assert not torch.allclose(turned["v"], rotations.rotate_block(w, gains, R1)["v"], atol=1e-2)
    loud = torch.randn(50, 16, generator=g)
    loud[:, 3] *= 30
    assert rotations.kurtosis(R1.apply(loud)).mean() < rotations.kurtosis(loud).mean() / 2


def test_a_layer_norm_is_an_rms_norm_of_a_centred_stream() -> None:
    W, b = rotations.centre_writer(torch.randn(8, 5), torch.randn(8))
    assert b is not None
    y = torch.randn(3, 5) @ W.T + b
    assert torch.allclose(F.layer_norm(y, (8,)), F.rms_norm(y, (8,), eps=1e-5), atol=1e-4)


def test_cayley_steps_stay_orthogonal_and_find_the_rotation() -> None:
    g = torch.Generator().manual_seed(0)
    target, X = Rotation(6, 5, "orthogonal").matrix(), torch.randn(40, 6, generator=g)
    if torch.linalg.det(target) < 0:  # Cayley steps cannot change the determinant's sign
        target[:, 0] *= -1
    R, history = rotations.learn_rotation(torch.eye(6), lambda R: (X @ R - X @ target).square().mean(), 300, 0.5)
    assert torch.allclose(R.T @ R, torch.eye(6), atol=1e-3)
    assert min(history) < 0.05 * history[0]


def test_spinquant_against_a_loop_and_never_above_its_start() -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(6, 8, generator=g), torch.randn(5, 8, generator=g)
    R = Rotation(4, 1).matrix()
    found = spinquant.rounding_loss(R, [spinquant.Seen(x, W)], 3, 4)
    wide = torch.block_diag(R, R)
    y, got = torch.zeros(6, 5), torch.zeros(6, 5)
    for t in range(6):
        for r in range(5):
            a, w = x[t] @ wide, W[r] @ wide
            sa, sw = a.abs().max() / 7, w.abs().max() / 3
            got[t, r] = sum(
                float(torch.round(p / sa) * sa * (torch.round(q / sw) * sw)) for p, q in zip(a, w, strict=True)
            )
            y[t, r] = x[t] @ W[r]
    assert float(found) == pytest.approx(float((got - y).square().sum() / y.square().sum()), rel=1e-4)

    x = torch.randn(64, 16, generator=g)
    x += (
        20 * torch.randn(64, 1, generator=g) * Rotation(16, 9).matrix()[0]
    )  # an outlier that Hadamard does not spread best
    seen = [spinquant.Seen(x, torch.randn(24, 16, generator=g))]
    config = spinquant.SpinQuant(steps=40, activation_bits=4)
    start = rotations.turns(config, 16, 4, 32)
    learned, notes = spinquant.spin(start, seen, [], config)
    assert learned.stream is not None and learned.values is start.values and learned.inner is None
    assert notes["stream_loss"] < 0.8 * notes["stream_loss_of_hadamard"]
    M = learned.stream.matrix()
    assert torch.allclose(M.T @ M, torch.eye(16), atol=1e-5)
    after = float(spinquant.rounding_loss(M, seen, 4, 4))
    assert after == pytest.approx(notes["stream_loss"], rel=0.05)


@pytest.mark.parametrize("per", ["token", "channel"])
def test_cache_against_a_loop_and_fewer_bits_are_worse(per: str) -> None:
    x = torch.randn(2, 3, 20, 8)
    config = kv_cache.CacheGrid(4, per, 8, recent=2)  # type: ignore[arg-type]
    y = kv_cache.fake_cache(x, config)
    done = 18 if per == "token" else 16
    assert torch.equal(y[:, :, done:], x[:, :, done:])
    group = x[1, 2, 5] if per == "token" else x[1, 2, 8:16, 3]
    low = float(group.min().half())
    step = float(torch.tensor((float(group.max()) - low) / 15).half())
    want = [max(0, min(15, round((float(v) - low) / step))) * step + low for v in group]
    got = y[1, 2, 5] if per == "token" else y[1, 2, 8:16, 3]
    assert torch.allclose(got, torch.tensor(want), atol=1e-3)
    errors = [float((kv_cache.fake_cache(x, kv_cache.CacheGrid(b, per, 8)) - x).square().sum()) for b in (8, 4, 2)]  # type: ignore[arg-type]
    assert errors[0] < errors[1] < errors[2]


def test_loud_key_channels_want_grids_per_channel() -> None:
    x = torch.randn(1, 2, 64, 16)
    x[..., 3] *= 30

    def quiet_error(per: str) -> float:
        y = kv_cache.fake_cache(x, kv_cache.CacheGrid(2, per, 16))  # type: ignore[arg-type]
        return float((y - x)[..., 4:].square().mean())

    assert quiet_error("channel") < quiet_error("token") / 5
    scale, zero = kv_cache.calibrate_static(x, kv_cache.CacheGrid(8, "channel", static=True))
    assert scale.shape == (2, 1, 16)
    assert float((kv_cache.fake_cache_static(x, scale, zero, 8) - x)[..., 4:].abs().max()) < 0.05


@pytest.mark.parametrize("per", ["token", "channel"])
def test_static_cache_grids_against_a_loop(per: str) -> None:
    x = torch.randn(2, 3, 20, 8)
    grid = kv_cache.CacheGrid(4, per, 4, static=True)  # type: ignore[arg-type]
    scale, zero = kv_cache.calibrate_static(x, grid)
    for h in range(3):
        for c in range(8):
            seen = x[:, h, :, c // 4 * 4 : c // 4 * 4 + 4] if per == "token" else x[:, h, :, c]
            step = float(((seen.max().clamp_min(0) - seen.min().clamp_max(0)) / 15).half())
            assert float(scale[h, 0, c]) == pytest.approx(step)
            assert float(zero[h, 0, c]) == round(-float(seen.min().clamp_max(0)) / step)
    y = kv_cache.fake_cache_static(x, scale, zero, 4)
    assert bool(((y - x).abs() <= scale * 0.51 + scale / 2 * 0.02 + scale * (x.abs() > 6.9 * scale)).all())
    tight, _ = kv_cache.calibrate_static(x, grid, 90.0)
    assert bool((tight <= scale).all()) and bool((tight < scale).any())


def test_layer_distillation_lowers_the_error_of_a_layer() -> None:
    g = torch.Generator().manual_seed(0)
    w = {"up": torch.randn(12, 8, generator=g), "down": torch.randn(8, 12, generator=g)}
    grids = {"up": Grid(2, 8), "down": Grid(2, 12)}

    def layer(weights, x: Tensor) -> Tensor:
        return F.relu(x @ weights["up"].T) @ weights["down"].T

    X = [torch.randn(32, 8, generator=g) for _ in range(2)]
    trained, before, after = distil_layer(layer, w, grids, X, [layer(w, x) for x in X], ZeroQuant(60, 1e-2))
    assert after < 0.8 * before
    rounded = {n: grids[n].project(v) for n, v in trained.items()}
    again = torch.stack([F.mse_loss(layer(rounded, x), layer(w, x)) for x in X]).mean()
    assert float(again) == pytest.approx(after, rel=1e-4)


def test_distillation_of_a_block_keeps_masks_and_gives_codes() -> None:
    g = torch.Generator().manual_seed(1)
    dense = {"up": torch.randn(12, 8, generator=g), "down": torch.randn(8, 12, generator=g)}
    x = [torch.randn(2, 20, 8, generator=g) for _ in range(2)]

    def forward(w, h: Tensor) -> Tensor:
        return torch.relu(h @ w["up"].T) @ w["down"].T

    solved = {}
    for name, pattern in (("up", None), ("down", Sparse(0.5))):
        p = Problem.of(
            dense[name], Stats.of(torch.randn(30, dense[name].shape[1], generator=g)), Both(pattern, Grid(2, 4))
        )
        solved[name] = p.project(p.weight.abs())
    block = BlockProblem(solved, x, x, [forward(dense, h) for h in x], forward)
    found = zeroquant(block, ZeroQuant(60, 3e-3))
    for s in found.values():
        assert s.codes is not None and torch.equal(s.codes.decode(), s.weight) and s.codes.bits == 2
    assert found["down"].mask is not None and not bool(found["down"].weight[~found["down"].mask].any())

    def error(of) -> float:
        now = {n: s.weight for n, s in of.items()}
        return sum(float((forward(now, h) - y).square().mean()) for h, y in zip(x, block.targets, strict=True)) / 2

    assert error(found) < 0.8 * error(solved)
    assert found["up"].notes["block_error_after"] == pytest.approx(error(found), rel=0.02)
    assert zeroquant(block, ZeroQuant(0)) == solved


def test_token_wise_scales_serve_quiet_tokens() -> None:
    x = torch.randn(4, 16) * torch.tensor([[0.01], [1.0], [1.0], [100.0]])
    W = torch.randn(5, 16)
    grid = Grid(8, None)
    codes = Codes.round(W, grid.fit_all(W), 8)
    y, exact = token_wise_linear(x, codes), x @ codes.decode().T
    assert float(((y - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 0.03


def test_smooth_solver_stacks() -> None:
    p = problem(12, 32, Grid(8, None, symmetric=True))
    two = Problem(
        p.weight, p.stats, Stack(((4, Both(None, Grid(8, None))), (8, Both(None, Grid(8, None))))), ("a", "b")
    )
    parts = two.split(smoothquant(two, SmoothQuant()))
    assert torch.equal(parts["a"].stored.factor, parts["b"].stored.factor)  # type: ignore[union-attr]
