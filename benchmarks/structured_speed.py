"""How much faster a structurally smaller demo model decodes: transformers and, after GGUF export, llama.cpp.

    .venv/bin/python benchmarks/structured_speed.py [--llama-python PYTHON] [--new 24] [--repeats 3]

The models are the demo, and what `structured-magnitude` leaves of it at 70% and 50% of the parameters (which units go does not matter for
speed). All models take turns in every repeat; one thread, greedy, batch 1, a prompt of 16 tokens; medians of the tokens per second of
processor time, because wall time on a shared machine says nothing. Prints a table; the ratios are to the dense model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from main_table import lissom

LEVELS = {"dense": None, "30% fewer": 0.7, "50% fewer": 0.5}
TRANSFORMERS = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print(json.dumps({}), flush=True)
for line in sys.stdin:
    new = json.loads(line)["new"]
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        start = time.process_time()
        for _ in range(new):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    print(json.dumps({"seconds": time.process_time() - start}), flush=True)
"""
LLAMA = """
import ctypes, json, sys, time
import llama_cpp as ll
quiet = ll.llama_log_callback(lambda *_: None); ll.llama_log_set(quiet, ctypes.c_void_p(0)); ll.llama_backend_init()
model = ll.Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
print(json.dumps({}), flush=True)
for line in sys.stdin:
    new = json.loads(line)["new"]
    model.reset(); model.eval(list(range(100, 116)))
    start = time.process_time()
    for i in range(new):
        model.eval([200 + i])
    print(json.dumps({"seconds": time.process_time() - start}), flush=True)
"""


def worker(python: str, code: str, path: str) -> subprocess.Popen[str]:
    made = subprocess.Popen([python, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    if not made.stdout.readline():
        raise SystemExit(f"{path} could not be loaded")
    return made


def ask(process: subprocess.Popen[str], new: int) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"new": new}) + "\n")
    process.stdin.flush()
    return new / json.loads(process.stdout.readline())["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--type", default="Q8_0")
    parser.add_argument("--keep", default="")
    options = parser.parse_args()
    work = Path(options.keep or tempfile.mkdtemp(prefix="lissom-speed-"))
    work.mkdir(parents=True, exist_ok=True)
    places: dict[str, tuple[str, str]] = {}
    for name, left in LEVELS.items():
        small, gguf = work / name.replace("% ", "-"), work / f"{name.replace('% ', '-')}.gguf"
        if not small.exists() and left is None:
            lissom("export", "demo", str(small), "--format", "dense")
        elif not small.exists():
            recipe = work / "recipe.yaml"
            shape = {"keep_neurons": 0.4, "keep_heads": 0.667 if left < 0.6 else 1.0}
            steps = [{"use": "structured-magnitude", **shape, "target": left, "of": "parameters"}]
            recipe.write_text(json.dumps({"steps": steps}), encoding="utf-8")
            lissom("compress", "demo", str(small), "--recipe", str(recipe), "--samples", "4", "--length", "64")
        if not gguf.exists():
            lissom("export", str(small), str(gguf), "--type", options.type, "--requantize")
        places[name] = (str(small), str(gguf))
    for tool, python, code, which in (
        ("transformers, fp32", sys.executable, TRANSFORMERS, 0),
        (f"llama.cpp, {options.type}", options.llama_python, LLAMA, 1),
    ):
        workers = {name: worker(python, code, paths[which]) for name, paths in places.items()}
        speeds: dict[str, list[float]] = {name: [] for name in workers}
        for process in workers.values():
            ask(process, 2)
        for _ in range(options.repeats):
            for name, process in workers.items():
                speeds[name].append(ask(process, options.new))
        for process in workers.values():
            process.kill()
        dense = statistics.median(speeds["dense"])
        for name, values in speeds.items():
            now = statistics.median(values)
            print(f"| {tool} | {name} | {now:.1f} | {now / dense:.2f} |", flush=True)


if __name__ == "__main__":
    main()
