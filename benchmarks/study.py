"""What the benchmarks share: arguments of the studies in memory, and the page of results."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"


def study_parser(description: str | None, windows: int) -> argparse.ArgumentParser:
    """The model, and the text it is calibrated and judged on: ``windows`` by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", default=str(DATA / "valid.txt"))
    return parser


def into_results(mark: str, lines: Iterable[str]) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` in RESULTS.md."""
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join((f"<!-- {mark} -->", *lines, f"<!-- /{mark} -->"))
    new, count = re.subn(f"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _: block, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} places for {mark}")
    PAGE.write_text(new, encoding="utf-8")
