"""``lissom(...)`` runs the entry point as the shell does, in this process."""

import json
import sys
from dataclasses import dataclass

import pytest


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def lissom(monkeypatch, capsys):
    from lissom.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lissom", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        seen = capsys.readouterr()
        return Ended(code, seen.out, seen.err)

    return run


SMALL = ["--samples", "4", "--length", "16"]
