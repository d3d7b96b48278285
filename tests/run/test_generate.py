"""Sampling rules against numpy, text without broken characters, exact speculation, batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kernels import extension
from lissom.run.engine import ContextError, Engine
from lissom.run.generation import Generation, Runner, generate
from lissom.run.sampling import RequestError, Sampling
from lissom.run.scheduler import BusyError, Scheduler, generate_batch
from lissom.run.text import TextStream
from tiny import tiny_model

pytestmark = pytest.mark.skipif(extension is None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    out = []
    for i, layers in enumerate((2, 1)):
        path = tmp_path_factory.mktemp(f"model{i}")
        tiny_model("llama", path, seed=i, num_hidden_layers=layers, max_position_embeddings=512)
        out.append(path)
    return out


@pytest.fixture(scope="module")
def runner(paths):
    return Runner(paths[0], context=512, slots=4, threads=1)


@pytest.fixture(scope="module")
def draft(paths):
    return Runner(paths[1], context=512, threads=1)


def distribution(logits, how, seen):
    """The rules of Sampling, spelled out."""
    logits = logits.astype(np.float64).copy()
    for t in set(seen):
        logits[t] = logits[t] / how.repetition_penalty if logits[t] > 0 else logits[t] * how.repetition_penalty
    p = np.exp((logits - logits.max()) / how.temperature)
    p[p < how.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if how.top_k:
        p[order[how.top_k :]] = 0
    p /= p.sum()
    if how.top_p < 1:
        mass = np.cumsum(p[order])
        p[order[int(np.searchsorted(mass, how.top_p - 1e-12)) + 1 :]] = 0
    return p / p.sum()


@settings(max_examples=20, deadline=None)
@given(
    top_k=st.sampled_from([0, 1, 3, 9]), top_p=st.sampled_from([1.0, 0.9, 0.5, 0.05]), min_p=st.sampled_from([0.0, 0.1, 0.5]),
    penalty=st.sampled_from([1.0, 1.5, 0.8]), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_draws_follow_the_rules(top_k, top_p, min_p, penalty, temperature, seed):
    how = Sampling(1, temperature, top_k, top_p, min_p, penalty)
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 2
    seen = [1, 5, 5]
    expected = distribution(logits, how, seen)
    draws = [extension.sample(logits.copy(), how.core(), seen, seed, i) for i in range(1500)]
    share = np.bincount(draws, minlength=12) / len(draws)
    assert set(np.flatnonzero(share)) <= set(np.flatnonzero(expected))
    assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / len(draws))


def test_greedy_takes_the_best_and_the_penalty_counts_once():
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert extension.sample(logits.copy(), Sampling().core(), [], 0, 0) == 1
    assert extension.sample(logits.copy(), Sampling(repetition_penalty=2.0).core(), [1, 1, 1], 0, 0) == 2
    assert extension.sample(logits.copy(), Sampling(repetition_penalty=1.4).core(), [1, 1, 1], 0, 0) == 1


def test_settings_are_checked_all_at_once():
    with pytest.raises(RequestError) as caught:
        Sampling(0, -1.0, -2, 0.0, 1.0, float("nan"), ("",), -1)
    assert len(caught.value.problems) == 8


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_streamed_text_is_whole_characters_up_to_the_stop(text, stop):
    stream, pieces = TextStream(Bytes(), stop), []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [i for i in (text.find(s) for s in stop) if i >= 0]
    if "\ufffd" not in text:
        assert "".join(pieces) == stream.text == (text[: min(ends)] if ends else text)
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_characters_at_the_end_are_shown():
    stream = TextStream(Bytes())
    assert [stream.push(b) for b in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_speculation_changes_nothing(runner, draft, temperature, penalty):
    settings = {"max_tokens": 60, "temperature": temperature, "repetition_penalty": penalty, "seed": 3}
    plain = generate(runner, "The value of", **settings)
    assert plain.text and len(plain.tokens) <= 60
    for helper, width in ((draft, 3), (runner_copy(runner), 5)):
        spec = generate(runner, "The value of", draft=helper, draft_tokens=width, **settings)
        assert spec.tokens == plain.tokens and spec.text == plain.text and spec.finish == plain.finish
    assert spec.drafted > 0 and spec.accepted == spec.drafted  # a model is always right about itself


def runner_copy(runner):
    return Runner(Engine(runner.engine.parts, context=512, threads=1))


def test_streaming_equals_the_whole(runner):
    for how in ({"seed": 1, "temperature": 1.5}, {"repetition_penalty": 1.2}):
        whole = generate(runner, "class", max_tokens=50, **how)
        assert "".join(generate(runner, "class", max_tokens=50, stream=True, **how)) == whole.text
    assert (
        generate(runner, "class", max_tokens=50, temperature=1.5, seed=2).tokens
        != generate(runner, "class", max_tokens=50, temperature=1.5, seed=1).tokens
    )


def test_stop_strings_end_the_text(runner):
    whole = generate(runner, "import", max_tokens=40)
    mark = whole.text[len(whole.text) // 2 :][:3]
    cut = generate(runner, "import", max_tokens=40, stop=mark)
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index(mark)]


def test_batches_equal_single_runs(runner):
    prompts = ["a", "The quick brown fox " * 9, "x = [", "statement " * 30, "def", "raise"]
    for how in (Sampling(20), Sampling(20, temperature=1.0, repetition_penalty=1.1, seed=9)):
        batch = generate_batch(runner, prompts, how)
        for prompt, got in zip(prompts, batch, strict=True):
            alone = Generation()
            list(runner.pieces(runner.encode(prompt), how, alone))
            assert got.tokens == alone.tokens and got.text == alone.text and got.finish == alone.finish
    assert runner.engine.free_positions >= 512


def test_short_prompts_go_first_and_long_ones_are_not_starved(runner):
    scheduler = Scheduler(runner, chunk=16, waiting=200)
    order = []

    def told(job, piece, done):
        if done:
            order.append(job.name)

    def put(name, length):
        job = scheduler.job([7] * length, Sampling(1), told)
        job.name = name
        scheduler.submit(job)

    put("long", 160)
    scheduler.step()
    put("short", 10)
    scheduler.drain()
    assert order == ["short", "long"]
    order.clear()
    put("long", 160)
    for i in range(60):  # a short prompt at every step
        put(i, 16)
        scheduler.step()
    scheduler.drain()
    before = order.index("long")
    assert 0 < before <= 2 * 160 / 16
    assert len(order) == 61 and runner.engine.free_positions >= 512


def test_cancelled_jobs_free_their_slot_and_full_lines_refuse(runner):
    scheduler = Scheduler(runner, waiting=1)
    jobs = [scheduler.job(runner.encode("for"), Sampling(100)) for _ in range(5)]
    for job in jobs:
        scheduler.submit(job)
    with pytest.raises(BusyError, match="waiting already"):
        scheduler.submit(scheduler.job([1], Sampling()))
    scheduler.step()
    assert [job.slot >= 0 for job in jobs] == [True] * 4 + [False]
    for job in (jobs[0], jobs[4]):
        scheduler.cancel(job)
    scheduler.step()
    assert jobs[0] not in scheduler.running and jobs[4] not in scheduler.waiting
    scheduler.drain()
    assert [len(job.result.tokens) > 1 for job in jobs[1:4]] == [True] * 3
    assert runner.engine.free_positions >= 512


def test_prompts_that_do_not_fit(runner):
    with pytest.raises(ContextError, match="shorten it"):
        generate(runner, list(range(5)) * 200)
    with pytest.raises(RequestError, match="token ids"):
        generate(runner, [99999])
    assert generate(runner, [5] * 500, max_tokens=100).finish in ("length", "stop")
