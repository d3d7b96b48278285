"""Every verb, in plain and in JSON form, and what the shell sees of it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lissom.cli.main import app
from lissom.methods import METHODS
from lissom.pipeline import shipped

SMALL = ["--samples", "4", "--length", "16"]
KEYS = {"perplexity", "tokens", "windows", "bytes", "bits_per_weight", "sparsity"}


def pipeline():
    """The module, which the function of the same name hides as an attribute of its package."""
    import lissom.pipeline

    return sys.modules[f"{lissom.pipeline.__name__}.compress"]


@pytest.fixture(scope="module")
def compressed(random_checkpoint, tmp_path_factory):
    """A packed artefact made through the command line, and its JSON."""
    out = tmp_path_factory.mktemp("cli") / "out"
    done = CliRunner().invoke(
        app, ["compress", str(random_checkpoint("llama")), str(out), "--recipe", "sparse-2-4", *SMALL, "--json"]
    )
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def test_compress_prints_one_json_object(compressed):
    out, said = compressed
    assert said["out"] == str(out) and said["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert said["bytes"] == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert {"seconds", "stages", "peak_rss_bytes", "bits_per_weight", "verified", "report", "calibration"} <= set(said)
    assert Path(said["report"]).is_file()


def test_compress_says_what_it_did(lissom, random_checkpoint, tmp_path):
    done = lissom(
        "compress", random_checkpoint("llama"), tmp_path / "out", "-r", "wanda", "--set", "sparsity=0.25", *SMALL
    )
    assert done.code == 0
    assert "25.0% zeros" in done.out and "report:" in done.out and "lissom evaluate" in done.out
    assert "format dense" in done.err  # the note that the file does not get smaller
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["command"].startswith("lissom compress") and "sparsity=0.25" in manifest["command"]


def test_options_reach_the_recipe(lissom, random_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    done = lissom(
        "compress", random_checkpoint("llama"), tmp_path / "out", "--recipe", "aggressive", "--calibration", text,
        "--samples", 3, "--length", 12, "--seed", 7, "--set", "bits=16", "--set", "sparsity=0.3", "--format", "dense",
        "--set", "embedding_bits=16", "--spill", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = done.json
    assert said["calibration"]["samples"] == 3 and said["calibration"]["seed"] == 7
    assert said["calibration"]["data"] == str(text)
    assert said["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert said["recipe"]["steps"][-1]["bits"] == 16 and said["recipe"]["save"]["format"] == "dense"


def test_bits_16_turns_quantization_off_with_a_recipe_that_only_quantizes(lissom, random_checkpoint, tmp_path):
    done = lissom("plan", random_checkpoint("llama"), "--recipe", "gptq", "--set", "bits=16", "--json")
    assert done.code == 0, done.err
    assert {row["bits"] for row in done.json["layers"]} == {16}


def test_evaluate_has_the_keys_that_scripts_read(lissom, compressed, random_checkpoint):
    out, _ = compressed
    done = lissom("evaluate", out, "--length", 16, "--windows", 3, "--against", random_checkpoint("llama"), "--json")
    assert done.code == 0, done.err
    assert set(done.json) >= KEYS | {"kl", "top1_agreement", "dense_perplexity", "bits_per_byte", "load_seconds"}
    assert done.json["tokens"] == 3 * 15 and done.json["windows"] == 3
    assert done.json["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert done.json["perplexity"] > 1
    # the report knows the evaluation now
    assert f"{done.json['perplexity']:.2f}" in (out / "report.html").read_text()


def test_evaluate_reads_for_people_too(lissom, compressed):
    done = lissom("evaluate", compressed[0], "--length", 16, "--windows", 2)
    assert done.code == 0 and "perplexity" in done.out and "bits_per_weight" in done.out


def test_unpack_restores_a_dense_directory(lissom, compressed, tmp_path):
    done = lissom("unpack", compressed[0], tmp_path / "dense", "--dtype", "float32", "--json")
    assert done.code == 0 and done.json["bytes"] > 0
    assert lissom("inspect", tmp_path / "dense", "--json").json["format"] == "dense"
    again = lissom("unpack", compressed[0], tmp_path / "dense")
    assert again.code == 5 and "exists" in again.err


@pytest.mark.parametrize("as_json", [True, False])
def test_plan_inspect_methods_recipes_report(lissom, compressed, random_checkpoint, as_json):
    out, _ = compressed
    source, flag = random_checkpoint("llama"), ["--json"] if as_json else []
    for command, words in [
        (["plan", source, "-r", "aggressive", "--set", "group_size=16"], ["alps", "gate", "estimates"]),
        (["inspect", source], ["llama", "gate", "blocks"]),
        (["inspect", out], ["packed"]),
        (["methods"], ["sparsegpt", "arXiv 2301.00774", "allocate"]),
        (["recipes"], ["aggressive", "sparse-2-4"]),
        (["report", out], ["report.html"]),
    ]:
        done = lissom(*command, *flag)
        assert done.code == 0, done.err
        for word in words:
            assert word in done.out, (command, word)
        if as_json:
            assert done.json


def test_methods_lists_the_table(lissom):
    rows = lissom("methods", "--json").json
    assert {r["name"] for r in rows} == set(METHODS)
    assert all(r["family"] and r["summary"] and r["source"] for r in rows)
    assert {r["name"] for r in lissom("recipes", "--json").json} >= set(shipped())


def test_help_of_every_verb(lissom):
    done = lissom("--help")
    assert done.code == 0
    for verb in ("compress", "plan", "inspect", "evaluate", "unpack", "methods", "recipes", "report"):
        assert verb in done.out
        assert lissom(verb, "--help").code == 0


def test_ctrl_c_leaves_with_130_and_says_how_to_go_on(lissom, random_checkpoint, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline(), "solve_and_save", interrupted)
    done = lissom("compress", random_checkpoint("llama"), tmp_path / "out", "-r", "wanda", *SMALL)
    assert done.code == 130
    assert "goes on" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_fresh_starts_over(lissom, random_checkpoint, tmp_path, monkeypatch):
    source, out = random_checkpoint("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline(), "solve_and_save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        lissom("compress", source, out, "-r", "wanda", *SMALL)
    refused = lissom("compress", source, out, "-r", "wanda", *SMALL, "--set", "sparsity=0.3")
    assert refused.code == 5 and "was 0.5, now 0.3" in refused.err
    done = lissom("compress", source, out, "-r", "wanda", *SMALL, "--set", "sparsity=0.3", "--fresh", "--json")
    assert done.code == 0 and done.json["sparsity"] == pytest.approx(0.3, abs=0.01)


def test_as_a_program(random_checkpoint, tmp_path):
    """One real process: standard output is the JSON alone, progress and notes go to standard error."""
    program = [str(Path(sys.executable).with_name("lissom")), "compress", str(random_checkpoint("llama"))]
    done = subprocess.run(
        [*program, str(tmp_path / "out"), "-r", "wanda", *SMALL, "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    assert not re.search(r"Traceback", done.stderr)
