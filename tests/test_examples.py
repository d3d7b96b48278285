"""The examples run."""

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_compress_and_evaluate(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(trained), str(tmp_path / "made"), "0.6"])
    runpy.run_path(str(EXAMPLES / "compress_and_evaluate.py"))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert set(rows) == {"magnitude", "joint"}
    assert all((tmp_path / "made" / name / "report.html").is_file() for name in rows)
    size, zeros, perplexity, kl = range(1, 5)
    assert float(rows["joint"][size]) < float(rows["magnitude"][size])
    assert float(rows["joint"][kl]) < float(rows["magnitude"][kl])
    assert float(rows["magnitude"][perplexity]) > 1 and rows["magnitude"][zeros].startswith("60.")
