"""Same inputs, same bytes: again, spilled to disk, killed at any step, killed by signal 9 at any moment."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import lissom
from lissom.core import OutputError

SETTINGS = ["samples=4", "length=16", "sparsity=0.6", "format=packed"]


class Killed(BaseException):
    """Nothing in the code may catch this, as nothing catches kill -9."""


def weights_of(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def go(source, out, *more, **options):
    text = f"calibration.data={Path(__file__)}"  # short, so that tokenising it takes no time
    return lissom.compress(source, out, "loss-clusters", overrides=[*SETTINGS, text, *more], **options)


@pytest.fixture(scope="module")
def source(random_checkpoint):
    return random_checkpoint("llama")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    go(source, out)
    return weights_of(out)


def test_same_seed_same_bytes_other_seed_other_bytes(source, expected, tmp_path):
    go(source, tmp_path / "again")
    assert weights_of(tmp_path / "again") == expected
    go(source, tmp_path / "other", "seed=1")
    assert weights_of(tmp_path / "other") != expected


def test_spilled_to_disk_the_bytes_are_the_same(source, expected, tmp_path):
    go(source, tmp_path / "out", spill=True)
    assert weights_of(tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob("spill*"))


class Counter:
    """Counts the steps that change the disk, and stops before the one numbered ``stop``."""

    def __init__(self, monkeypatch, stop=None):
        self.calls, self.stop = 0, stop
        for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "copyfile")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, original):
        def call(*args, **kwargs):
            if self.calls == self.stop:
                raise Killed
            self.calls += 1
            return original(*args, **kwargs)

        return call


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_before_any_step_on_disk_it_goes_on_to_the_same_bytes(source, expected, tmp_path, every):
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        go(source, tmp_path / "count")
    assert counter.calls > 15
    for stop in [*range(0, counter.calls, every), counter.calls - 1]:
        out = tmp_path / f"out{stop}"
        with pytest.MonkeyPatch.context() as patch:
            Counter(patch, stop)
            with pytest.raises(Killed):
                go(source, out)
        assert not out.exists(), f"stopped before step {stop}, OUT is there"
        go(source, out)
        assert weights_of(out) == expected, f"stopped before step {stop}"
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "count").iterdir())
        assert not list(tmp_path.glob("*.partial"))
        shutil.rmtree(out)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_killed_by_signal_9_it_goes_on_to_the_same_bytes(source, expected, tmp_path, part):
    """A forked child is killed; a fork spares the seconds of importing torch again."""
    start = time.perf_counter()
    go(source, tmp_path / "timed")
    whole = time.perf_counter() - start
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        go(source, out)
        os._exit(0)
    time.sleep(part * whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not out.exists():
        go(source, out)
    assert weights_of(out) == expected


def interrupted(source, out):
    """Leave the working directory of a run that was stopped in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, 9)
        with pytest.raises(Killed):
            go(source, out)
    assert out.with_name(out.name + ".partial").is_dir()


def test_finished_blocks_are_not_solved_again(source, expected, tmp_path, monkeypatch):
    from lissom.models import Model

    out, loaded = tmp_path / "out", []
    with pytest.MonkeyPatch.context() as patch:
        # stop when the second block's file is to be written
        original = os.replace

        def replace(a, b):
            if "part-block-00001" in str(b):
                raise Killed
            original(a, b)

        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            go(source, out)
    load = Model.load_block
    monkeypatch.setattr(Model, "load_block", lambda self, i: loaded.append(i) or load(self, i))
    monkeypatch.setattr(sys.modules["lissom.pipeline.compress"], "verify", lambda *_: {})
    notes = []
    go(source, out, note=notes.append)
    assert loaded == [1]
    assert any("resuming" in n for n in notes)
    assert weights_of(out) == expected


@pytest.mark.parametrize(
    "change, words",
    [("seed=5", "calibration.seed: was 0, now 5"), ("sparsity=0.5", "sparsity: was 0.6, now 0.5"),
     ("dtype=float16", "save.dtype: was 'auto', now 'float16'")],
)  # fmt: skip
def test_changed_inputs_refuse_to_resume_and_say_what_changed(source, expected, tmp_path, change, words):
    out = tmp_path / "out"
    interrupted(source, out)
    with pytest.raises(OutputError) as caught:
        go(source, out, change)
    assert words in str(caught.value) and "--fresh" in str(caught.value)
    go(source, out)  # the old inputs still go on
    assert weights_of(out) == expected


def test_changed_weights_refuse_to_resume(source, tmp_path):
    from tiny import tiny_model

    out = tmp_path / "out"
    interrupted(source, out)
    tiny_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="source: was"):
        go(tmp_path / "other", out)


def test_fresh_throws_the_unfinished_run_away(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out)
    go(source, out, "seed=5", resume=False)
    go(source, tmp_path / "direct", "seed=5")
    assert weights_of(out) == weights_of(tmp_path / "direct")


def test_a_second_run_on_the_same_out_is_refused_while_the_first_lives(source, expected, tmp_path):
    from lissom.pipeline.lock import alone

    out = tmp_path / "out"
    with alone(tmp_path / "out.partial"), pytest.raises(OutputError, match="another lissom process"):
        go(source, out)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    go(source, out)
    assert weights_of(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # the lock's file is gone
