"""What the benchmarks share: arguments of the studies in memory, and the page of results."""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lissom.evaluate import load_text, token_losses, tokenize, windows
from lissom.models import Model
from lissom.pipeline.data import CalibrationSet, load_calibration
from lissom.pipeline.recipe import Step
from lissom.pipeline.sections import Calibration
from lissom.pipeline.stream import Extras, LayerResult
from lissom.pipeline.trials import trial

HERE = Path(__file__).parent
T = TypeVar("T")
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


def calibrated(model: Model, options: argparse.Namespace) -> CalibrationSet:
    """Calibration samples, with the windows of the test text as what goes along and feeds no statistics."""
    tokenizer = model.checkpoint.tokenizer()
    setting = Calibration(options.calibration, options.samples, options.length)
    data = load_calibration(tokenizer, setting, model.config.vocab_size)
    test = windows(tokenize(tokenizer, load_text(options.test)), options.windows, options.length)
    return dataclasses.replace(data, held_out=test)


@torch.no_grad()
def judged(
    model: Model,
    step: Step | None,
    data: CalibrationSet,
    outer: Mapping[str, torch.Tensor] | None = None,
    visit: Callable[[LayerResult], None] | None = None,
    extras: Extras | None = None,
) -> float:
    """Perplexity on the test windows of the model compressed by one step in memory; ``outer``: tensors outside of blocks."""
    final = trial(model, [(step, None)] if step else [], data, outer=outer, visit=visit, extras=extras)
    losses = [token_losses(model, h[None], row, outer) for h, row in zip(final, data.held_out, strict=True)]
    mean = float(torch.cat(losses).double().mean())
    return math.exp(mean) if mean < 700 else math.inf


def shared(rows: Sequence[T], which: str) -> list[T]:
    """Of ``which`` "k/n" every n-th row from the k-th on, so that n calls at once do all."""
    k, n = map(int, which.split("/"))
    return list(rows[k - 1 :: n])


def on_host(row: Mapping[str, Any]) -> bool:
    """Whether a kept row was run on the processor, so that its times compare."""
    return row.get("device", "cpu") == "cpu"


def into_results(mark: str, lines: Iterable[str]) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- /mark -->`` in RESULTS.md."""
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join((f"<!-- {mark} -->", *lines, f"<!-- /{mark} -->"))
    new, count = re.subn(f"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _: block, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} places for {mark}")
    PAGE.write_text(new, encoding="utf-8")
