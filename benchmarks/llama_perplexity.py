"""Perplexity of a GGUF file in llama.cpp on the tokens that `lissom evaluate` uses, to compare the two.

.venv/bin/python benchmarks/llama_perplexity.py ids TEXT --length 512 --windows 4 > ids.json     (lissom's environment)
…/llamacpp/bin/python benchmarks/llama_perplexity.py run MODEL.gguf ids.json                     (llama-cpp-python's)
"""

import argparse
import json
import math
from pathlib import Path


def ids(text: str, length: int, windows: int) -> None:
    from lissom.evaluate import load_text, tokenize
    from lissom.evaluate import windows as cut
    from lissom.models import open_checkpoint

    rows = cut(tokenize(open_checkpoint("demo").tokenizer(), load_text(text)), windows, length)
    print(json.dumps(rows.tolist()))


def run(model: str, path: str) -> None:
    import numpy as np
    from llama_cpp import Llama

    rows = json.loads(Path(path).read_text())
    llama = Llama(
        model, n_ctx=len(rows[0]), n_batch=len(rows[0]), n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    total, count = 0.0, 0
    for row in rows:
        llama.reset()
        llama.eval(row)
        logits = np.asarray(llama.scores[: len(row) - 1], np.float64)
        top = logits.max(1, keepdims=True)
        normal = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        total += float((normal - logits[np.arange(len(row) - 1), row[1:]]).sum())
        count += len(row) - 1
    print(json.dumps({"model": model, "perplexity": math.exp(total / count), "tokens": count}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True, dest="verb")
    first = verbs.add_parser("ids")
    first.add_argument("text")
    first.add_argument("--length", type=int, default=512)
    first.add_argument("--windows", type=int, default=4)
    second = verbs.add_parser("run")
    second.add_argument("model")
    second.add_argument("path")
    given = vars(parser.parse_args())
    {"ids": ids, "run": run}[given.pop("verb")](**given)
