"""benchmarks/soak.py in small: it finds nothing in a sound server, and says so when clients get no answer."""

import sys
from pathlib import Path

import pytest

from lissom.kernels import extension
from tiny import tiny_model

pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(extension is None, reason="needs the C++ extension")]


def test_a_short_soak(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from soak import soak

    tiny_model("llama", tmp_path, max_position_embeddings=2048)
    result = soak(str(tmp_path), clients=12, seconds=4, slots=4, threads=1, patience=30)
    assert result["problems"] == [] and result["errors"] == 0
    assert result["answers"] > 12 and result["vanished"] > 0
    impatient = soak(str(tmp_path), clients=12, seconds=2, slots=1, threads=1, patience=1e-4)
    assert any("stuck" in text for text in impatient["problems"])
    sys.modules.pop("soak", None)
