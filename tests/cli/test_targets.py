"""Targets on the command line: what is said before a run, in plain and in JSON form, and what is refused."""

import json

import pytest

import tiny

SMALL = ["--samples", "4", "--length", "32", "--set", "group_size=32", "--set", "target.measure=false"]
SMALL += ["--calibration", tiny.__file__]


def test_plan_says_what_is_chosen_and_expected(lissom, trained):
    done = lissom("plan", trained, "--recipe", "sparsegpt", "--format", "packed", "--target-size", "80kB", *SMALL)
    assert done.code == 0, done.err
    assert "expected: 80" in done.out.replace("79.9", "80") and "KL" in done.out and "embedding in" in done.out
    assert "down" in done.out


def test_plan_in_json(lissom, trained):
    done = lissom("plan", trained, "-r", "gptq", "--target-bits", "5", *SMALL, "--json")
    said = done.json
    assert said["target"]["expected_bytes"] == pytest.approx(5 * 180800 / 8, rel=0.01)
    assert said["recipe"]["target"]["bits"] == 5 and len(said["layers"]) == 28
    assert said["target"]["layers"]["embedding"]["bits"] == said["target"]["embedding_bits"]


def test_compress_says_the_loss_before_it_starts_and_ends_at_the_size(lissom, trained, tmp_path):
    done = lissom("compress", trained, tmp_path / "out", "-r", "gptq", "--target-size", "80kB", *SMALL)
    assert done.code == 0, done.err
    assert "expected: " in done.err and "predicted from the curves" in done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["bytes"] == pytest.approx(8e4, rel=0.01) and "--target-size 80kB" in manifest["command"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-size", "sixty"], "is no size"),
        (["--target-size", "1kB"], "the nearest is --target-size"),
        (["--target-size", "60MB", "--target-bits", "2"], "one of size, bits and max_kl"),
        (["--max-kl", "1", "--target-bits", "2"], "one of size, bits and max_kl"),
        (["--target-size", "60MB", "--set", "bits=4"], "the target chooses bits"),
        (["--target-size", "60MB", "--format", "dense"], "needs format packed"),
    ],
)
def test_refusals(lissom, trained, tmp_path, options, words):
    command = ["compress", trained, tmp_path / "out", "-r", "gptq", "--samples", "4", "--length", "32", *options]
    done = lissom(*command)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err
    assert words in lissom(*command, "--json").json["message"]
    assert not list(tmp_path.iterdir())
