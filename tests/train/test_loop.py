"""The loop: exact resume, ranks that agree with one process, NaN, early stop, EMA, limits."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from lissom.core import CalibrationError, NumericalError, OutputError
from lissom.train import Batches, Mixture, Ranks, Training, reweighted, train

IDS = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(0))


def _problem(seed=0):
    """A bigram model: one leaf, the loss of a batch is its cross-entropy."""
    leaf = torch.zeros(50, 50).add_(torch.randn(50, 50, generator=torch.Generator().manual_seed(seed)) * 0.1)
    leaf.requires_grad_()

    def loss(ids):
        return torch.nn.functional.cross_entropy(leaf[ids[:, :-1].flatten()], ids[:, 1:].flatten())

    return leaf, loss


DATA = Batches(IDS, 9, 8)
SHORT = Training(steps=12, learning_rate=0.05, evaluate_every=4, save_every=3, ema=0.9)


def _run(config=SHORT, data=DATA, **rest):
    leaf, loss = _problem()
    state = train({"w": leaf}, loss, data, config, held_out=lambda: float(loss(DATA.at(10**6))), **rest)
    return leaf.detach(), state


def test_it_learns_and_keeps_the_best():
    leaf, state = _run(Training(steps=60, learning_rate=0.1, evaluate_every=10))
    assert state.history[-1]["held_out"] < state.history[0]["held_out"] - 0.2
    assert [row["step"] for row in state.history] == [0, 10, 20, 30, 40, 50, 60]
    assert torch.equal(leaf, state.best["w"])


def test_killed_and_resumed_it_ends_with_the_same_bytes(tmp_path):
    whole, state = _run()

    def stop(step, total, row):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(folder=tmp_path, tick=stop)
    again, resumed = _run(folder=tmp_path)  # from step 6, the newest state on disk
    assert torch.equal(whole, again)
    plain = [[{k: r[k] for k in ("step", "held_out")} for r in s.history] for s in (state, resumed)]
    assert plain[0] == plain[1]
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12
    finished, _ = _run(folder=tmp_path)  # a finished training is not done again
    assert torch.equal(whole, finished)


def test_a_state_of_other_settings_is_refused(tmp_path):
    _run(folder=tmp_path)
    with pytest.raises(OutputError, match="other settings"):
        _run(Training(steps=13, learning_rate=0.05), folder=tmp_path)
    with pytest.raises(OutputError, match="other settings"):
        _run(folder=tmp_path, identity="other data")


def test_accumulation_changes_nothing_but_rounding():
    one, _ = _run()
    four, _ = _run(Training(**{**SHORT.__dict__, "accumulate": 3}))  # 3 + 3 + 2 sequences
    assert torch.allclose(one, four, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(tmp_path):
    leaf, loss = _problem()
    seen = []

    def breaks(ids):
        seen.append(leaf.detach().clone())
        return loss(ids) * (math.nan if len(seen) == 6 else 1.0)

    with pytest.raises(NumericalError, match=r"loss of step 6 .*windows at tokens \[\d+"):
        train({"w": leaf}, breaks, DATA, SHORT, folder=tmp_path)
    assert torch.equal(leaf.detach(), seen[-1]) and torch.isfinite(leaf).all()
    assert (tmp_path / "training.safetensors").is_file()


def test_a_gradient_that_is_not_finite_stops_too():
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(NumericalError, match="gradient of step 1"):
        train({"w": leaf}, lambda ids: leaf.sqrt().sum(), DATA, SHORT)
    assert torch.equal(leaf.detach(), torch.zeros(3))


def test_patience_ends_early_and_the_best_remains():
    leaf, loss = _problem()
    values = iter([5.0, 4.0, 4.5, 4.6, 4.7, 0.0])
    config = Training(steps=50, learning_rate=0.1, evaluate_every=2, patience=2)
    marks = {}

    def held_out():
        marks[len(marks)] = leaf.detach().clone()
        return next(values)

    state = train({"w": leaf}, loss, DATA, config, held_out=held_out)
    assert state.step == 6 and state.best_loss == 4.0
    assert torch.equal(leaf.detach(), marks[1])


def test_minutes_end_a_training():
    _, state = _run(Training(steps=10**6, minutes=0.002, learning_rate=0.01))
    assert 0 < state.step < 10**5 and state.seconds < 5
    assert state.history[-1]["step"] == state.step


def test_the_average_follows_by_hand():
    leaf, loss = _problem()
    track = []
    state = train(
        {"w": leaf}, loss, DATA, Training(steps=3, learning_rate=0.1, ema=0.5),
        before_step=lambda step, progress: track.append((step, progress, leaf.detach().clone())),
    )  # fmt: skip
    assert [t[:2] for t in track] == [(0, 0), (1, 1 / 3), (2, 2 / 3)]
    expected = track[0][2]
    for value in (track[1][2], track[2][2]):
        expected = 0.5 * expected + 0.5 * value
    # the last step is in the average with weight one half: the leaf itself is not visible any more
    last = 2 * state.ema["w"] - expected
    assert torch.equal(leaf.detach(), state.ema["w"]) and not torch.allclose(last, track[2][2])


def test_batches_are_a_function_of_the_step():
    assert torch.equal(DATA.at(5), Batches(IDS, 9, 8).at(5))
    assert not torch.equal(DATA.at(5), DATA.at(6))
    assert torch.equal(DATA.at(0)[2], IDS[DATA.starts(0)[2] :][:9])
    with pytest.raises(CalibrationError, match="fewer than one window"):
        Batches(IDS[:9], 9, 1)


def test_mixtures_follow_their_shares_and_dynamic_loading_moves_them():
    texts = {"a": DATA, "b": Batches(IDS + 100, 9, 8)}
    mixture = Mixture(texts, {"a": 1.0, "b": 3.0}, 8)
    drawn = sum(mixture.counts(s)["b"] for s in range(200)) / 1600
    assert drawn == pytest.approx(0.75, abs=0.04)
    assert mixture.at(3).shape == (8, 9) and len(mixture.starts(3)) == 8
    assert int((mixture.at(3) >= 100).all(1).sum()) == mixture.counts(3)["b"]
    new = reweighted({"a": 0.25, "b": 0.75}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.5})
    e = math.e * 0.25
    assert new["a"] == pytest.approx((1 - 1e-4) * e / (e + 0.75) + 5e-5) and sum(new.values()) == pytest.approx(1)
    with pytest.raises(CalibrationError):
        Mixture(texts, {"a": 0.0, "b": 0.0}, 8)


def test_a_batch_must_divide_over_the_ranks():
    assert Ranks(1, 2).share(torch.arange(4)[:, None]).flatten().tolist() == [1, 3]
    with pytest.raises(CalibrationError, match="does not divide over 3"):
        Ranks(0, 3).share(torch.zeros(8, 2))


_WORKER = """
import sys, torch; sys.path.insert(0, {tests!r}); torch.set_num_threads(1)
from test_loop import _problem, DATA, SHORT
from lissom.train import Ranks, train
leaf, loss = _problem()
ranks = Ranks.here()
train({{"w": leaf}}, loss, DATA, SHORT, held_out=lambda: float(loss(DATA.at(10**6))), ranks=ranks)
if ranks.rank == 0:
    torch.save(leaf.detach(), {out!r})
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path):
    out, script = str(tmp_path / "w.pt"), tmp_path / "worker.py"
    script.write_text(_WORKER.format(tests=os.path.dirname(__file__), out=out))
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }
    workers = [
        subprocess.Popen([sys.executable, str(script)], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [w.wait(120) for w in workers] == [0, 0]
    alone, _ = _run()
    assert torch.allclose(torch.load(out), alone, atol=1e-5)


def test_rates_scale_single_leaves_and_hooks_keep_state_in_leaves_without_gradients(tmp_path):
    def go(folder=None, stop=None):
        a, b, kept = (torch.zeros(3) for _ in range(3))
        a.requires_grad_(), b.requires_grad_()

        def after(step, progress):
            with torch.no_grad():
                kept.add_(step + 1)
                a.clamp_(max=0.015)  # a projection

        def tick(step, total, row):
            if step == stop:
                raise KeyboardInterrupt

        config = Training(steps=4, learning_rate=0.01, warmup=0, shape="constant", weight_decay=0.5, save_every=1)
        train(
            {"a": a, "b": b, "kept": kept}, lambda ids: -(a + b).sum(), DATA, config, rates={"b": 10.0},
            after_step=after, folder=folder, tick=tick,
        )  # fmt: skip
        return a.detach(), b.detach(), kept

    a, b, kept = go()
    assert kept.tolist() == [10] * 3 and a.tolist() == pytest.approx([0.015] * 3)
    assert b.tolist() == pytest.approx([0.4] * 3, rel=1e-4)  # Adam: one learning rate a step, no weight decay
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, stop=2)
    for one, other in zip(go(tmp_path), (a, b, kept), strict=True):
        assert torch.equal(one, other)


def test_a_rewound_training_starts_in_the_middle_of_the_schedule():
    def moves(rewind):
        leaf, seen = torch.zeros(1, requires_grad=True), []
        config = Training(steps=4, learning_rate=0.1, warmup=0, rewind=rewind, clip=None, betas=(0.0, 0.0))
        train(
            {"w": leaf}, lambda ids: leaf.sum(), DATA, config, after_step=lambda *_: seen.append(float(leaf.detach()))
        )
        return [a - b for a, b in itertools.pairwise([0.0, *seen])]  # the learning rate of every step

    by_hand = [0.1 * 0.5 * (1 + math.cos(math.pi * (0.5 + 0.5 * p))) for p in (1 / 8, 1 / 4, 1 / 2, 3 / 4)]
    assert moves(0.5) == pytest.approx(by_hand, rel=1e-4)
    assert moves(0.0)[0] > moves(0.5)[0]
    with pytest.raises(ValueError, match="rewind"):
        Training(rewind=1.0)


def test_the_last_leaves_remain_where_the_best_are_not_asked_for():
    leaf, loss = _problem()
    seen = []

    def held_out():
        seen.append(leaf.detach().clone())
        return float(len(seen))  # worse every time

    state = train(
        {"w": leaf},
        loss,
        DATA,
        Training(steps=4, learning_rate=0.1, evaluate_every=2, keep_best=False),
        held_out=held_out,
    )
    assert torch.equal(leaf.detach(), seen[-1]) and not state.best and state.best_loss == 1.0
    with pytest.raises(ValueError, match="patience"):
        Training(patience=2, keep_best=False)


def test_an_interrupted_save_keeps_the_state_before_it(tmp_path, monkeypatch):
    import lissom.train.loop as loop

    whole, _ = _run()
    real, calls = loop.save_file, []

    def breaks(tensors, path, *rest):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of a file")
            raise OSError("no space left on device")
        real(tensors, path, *rest)

    monkeypatch.setattr(loop, "save_file", breaks)
    with pytest.raises(OutputError, match=r"cannot save the training.*the state saved before is kept"):
        _run(folder=tmp_path)
    assert [p.name for p in tmp_path.glob("*safetensors*")] == ["training.safetensors"]
    again, _ = _run(folder=tmp_path)  # from step 3
    assert torch.equal(whole, again)
    (tmp_path / "training.safetensors").write_bytes(b"damaged")
    with pytest.raises(OutputError, match="is damaged"):
        _run(folder=tmp_path)


def test_curves_for_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, state = _run(tensorboard=tmp_path / "board")
    read = events.EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    held = {e.step: e.value for e in read.Scalars("held_out")}
    assert held == pytest.approx({r["step"]: r["held_out"] for r in state.history}, rel=1e-5)
    assert [e.step for e in read.Scalars("loss")] == list(range(1, 13))
    assert {"loss", "gradient_norm", "learning_rate", "perplexity"} <= set(read.Tags()["scalars"])


def test_without_tensorboard_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OutputError, match=r"pip install 'lissom\[tensorboard\]'"):
        _run(tensorboard=tmp_path / "board")
