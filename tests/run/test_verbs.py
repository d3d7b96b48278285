"""The verbs through a typer app of their own."""

import json

import pytest
import typer
from typer.testing import CliRunner

from lissom.core import LissomError
from lissom.kernels import extension
from lissom.run.bench import bench, llama_contender
from lissom.run.commands import add_commands
from lissom.run.generation import generate
from lissom.run.rounding import rounding
from tiny import tiny_model

pytestmark = pytest.mark.skipif(extension is None, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("verbs")
    tiny_model("llama", out)
    return str(out)


def call(*arguments, text=None):
    app = typer.Typer()
    add_commands(app)
    return CliRunner().invoke(app, list(arguments), input=text)


def test_generate(path):
    expected = generate(path, "class", max_tokens=12)
    assert call("generate", path, "class", "-n", "12").stdout == expected.text + "\n"
    result = json.loads(call("generate", path, "-", "-n", "12", "--json", text="class").stdout)
    assert result["text"] == expected.text and result["tokens"] == expected.tokens
    assert call("generate", path, "class", "-n", "12", "--draft", path).stdout == expected.text + "\n"


def test_chat_keeps_the_conversation(path):
    one = call("chat", path, "-n", "10", "--temperature", "0", text="hello\n").stdout
    two = call("chat", path, "-n", "10", "--temperature", "0", text="hello\nmore\n").stdout
    assert two.startswith(one) and len(two) > len(one)


def test_bad_settings_are_named(path):
    for arguments, says in (
        (["--cache-bits", "5"], "8 or 4"),
        (["--round", "int9"], "int9"),
        (["--temperature", "-1"], "temperature"),
    ):
        error = call("generate", path, "x", *arguments).exception
        assert isinstance(error, LissomError) and says in str(error)


def test_rounding_makes_what_it_says():
    import torch

    codes, mask = rounding("4:16 int4")("w", torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    assert codes.bits == 4 and mask is not None
    assert bool((mask.reshape(8, -1, 16).sum(2) == 4).all())


def test_rivals_that_are_missing_are_reported(path):
    with pytest.raises(LissomError, match="llama-cpp-python"):
        llama_contender(path, 1, 64, "/nowhere/python", None, "q4_0")
    with pytest.raises(LissomError, match="only with llama"):
        bench(path, against="vllm")


@pytest.mark.slow
def test_bench(path):
    result = json.loads(
        call("bench", path, "--prompt-tokens", "20", "--new-tokens", "5", "--repeats", "1", "--json").output
    )
    assert result["decode_tokens_per_s"] > 0 and result["ttft_s"] > 0 and result["peak_rss_bytes"] > 10**7
    result = bench(path, prompt_tokens=8, new_tokens=2, repeats=1, against="llama.cpp", llama_python="/nowhere")
    assert "llama-cpp-python" in result["against"]["missing"]
