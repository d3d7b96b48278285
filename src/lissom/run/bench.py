"""Speed of the runtime, beside llama.cpp on the same model, prompt and threads in the same run.

Each contender is a process of its own (so that its peak of memory is its own) that repeats the same job; the parent
lets them take turns and reports medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import LissomError

_LLAMA_PYTHON = "LISSOM_LLAMA_PYTHON"


def some_tokens(count: int, vocabulary: int) -> list[int]:
    """A fixed prompt; the speed does not depend on what it says."""
    return [(7919 * i + 13) % vocabulary for i in range(count)]


class Contender:
    """A child process that answers one JSON line with one JSON line."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None):
        self.name, self.runs = name, []
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )  # fmt: skip
        self.info = self._read()

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new": new}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines()
            raise LissomError(f"{self.name} ended: {said[-1] if said else 'no message'}")
        return json.loads(line)


def bench(
    model: str,
    threads: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    against: str | None = None,
    llama_python: str | None = None,
    llama_model: str | None = None,
    llama_quantization: str = "q4_0",
    rounded: str | None = None,
    outer_bits: int = 8,
    cache_bits: int | None = None,
) -> dict[str, Any]:
    """Medians of ``repeats`` interleaved runs after one warm-up.

    ``against``: "llama.cpp" to compare; ``llama_python``: a Python that has llama-cpp-python (or the variable
    LISSOM_LLAMA_PYTHON, or this Python); ``llama_model``: its GGUF file (the demo model knows its own), which llama.cpp
    requantizes to ``llama_quantization`` ("as-is": not). Keys: ``decode_tokens_per_s``, ``prefill_tokens_per_s``,
    ``ttft_s``, ``peak_rss_bytes``, ``weight_bytes_per_token``, and the first four again under ``against``.
    """
    if against not in (None, "llama.cpp"):
        raise LissomError(f"cannot compare with {against!r}: only with llama.cpp")
    worker = [
        sys.executable,
        "-m",
        "lissom.run.bench",
        model,
        str(threads),
        str(prompt_tokens + new_tokens + 32),
        rounded or "",
        str(outer_bits),
        str(cache_bits or 0),
    ]
    contenders = [Contender("lissom", worker)]
    missing = None
    if against:
        try:
            contenders.append(
                llama_contender(
                    model, threads, prompt_tokens + new_tokens + 32, llama_python, llama_model, llama_quantization
                )
            )
        except LissomError as error:
            missing = str(error)
    prompt = some_tokens(prompt_tokens, contenders[0].info["vocabulary"])
    for contender in contenders:
        contender.run(prompt, 8)
    for _ in range(repeats):
        for contender in contenders:
            contender.runs.append(contender.run(prompt, new_tokens))
    results = [_summary(c, prompt_tokens, new_tokens) for c in contenders]
    for contender in contenders:
        contender.close()
    out = {
        "model": model,
        "threads": threads,
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    out |= results[0]
    if against:
        out["against"] = {"engine": against, "missing": missing} if missing else {"engine": against, **results[1]}
    return out


def _summary(contender: Contender, prompt: int, new: int) -> dict[str, Any]:
    def median(key: str) -> float:
        return statistics.median(run[key] for run in contender.runs)

    return {
        "decode_tokens_per_s": new / median("decode_s"),
        "prefill_tokens_per_s": prompt / median("prefill_s"),
        "ttft_s": median("prefill_s"),
        # by processor time of all threads: what a busy machine leaves comparable
        "decode_tokens_per_cpu_s": new / median("decode_cpu_s"),
        "prefill_tokens_per_cpu_s": prompt / median("prefill_cpu_s"),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in contender.runs),
        **{k: v for k, v in contender.info.items() if k != "vocabulary"},
    }


def llama_contender(
    model: str, threads: int, context: int, python: str | None, file: str | None, quantization: str,
    environment: dict[str, str] | None = None,
) -> Contender:  # fmt: skip
    from ..models import demo_file

    python = python or os.environ.get(_LLAMA_PYTHON) or sys.executable
    found = (
        subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        if Path(python).exists()
        else None
    )
    if found is None or found.returncode:
        raise LissomError(
            f"{python} has no llama-cpp-python: `python -m venv rival && rival/bin/pip install llama-cpp-python`, then "
            "pass --llama-python rival/bin/python"
        )
    path = file or (str(demo_file()) if model == "demo" else model)
    if not path.endswith(".gguf"):
        raise LissomError(f"llama.cpp reads GGUF files only: give one of the same model with --llama-model, not {path}")
    script = str(Path(__file__).with_name("llama_worker.py"))
    return Contender("llama.cpp", [python, script, path, quantization, str(threads), str(context)], environment)


def _work(model: str, threads: int, context: int, rounded: str, outer_bits: int, cache_bits: int) -> None:
    """The child process of lissom itself."""
    from ..kernels.native import extension, isa
    from .engine import Engine
    from .start import open_parts

    started = time.perf_counter()
    parts = open_parts(model, rounded or None, outer_bits)
    engine = Engine(parts, threads=threads, context=context, cache_bits=cache_bits or None)
    loaded = time.perf_counter() - started
    assert extension is not None
    greedy = extension.Sampling(0.0, 0, 1.0, 0.0, 1.0)
    forms = sorted(set(engine.layers.forms.values()))
    info = {"load_s": loaded, "weight_bytes_per_token": engine.bytes_per_token, "forms": forms, "isa": isa()}
    print(json.dumps(info | {"vocabulary": engine.vocabulary}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        engine.release()
        start, cpu = time.perf_counter(), time.process_time()
        token = int(engine.prefill(job["prompt"]).argmax())
        middle, cpu_middle = time.perf_counter(), time.process_time()
        tokens = engine.decode(token, len(job["prompt"]), job["new"], greedy)
        end = time.perf_counter()
        times = {"prefill_s": middle - start, "decode_s": end - middle, "tokens": [token, *tokens]}
        times |= {"prefill_cpu_s": cpu_middle - cpu, "decode_cpu_s": time.process_time() - cpu_middle}
        print(json.dumps(times | {"peak_rss_bytes": _peak()}), flush=True)


def _peak() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
