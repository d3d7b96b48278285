"""Arguments that the studies in memory share."""

import argparse
from pathlib import Path

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
