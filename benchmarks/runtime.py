"""Decode and prefill speed of several forms of one model beside llama.cpp, all interleaved in one run.

    flock /tmp/lissom.lock .venv/bin/python benchmarks/runtime.py --llama-python /tmp/llamacpp/bin/python

Weights are rounded to nearest at load (speed does not depend on their quality). Medians of wall time, and of processor
time for one thread, which stays comparable on a machine that others use. Prints the rows of benchmarks/RUNTIME.md.
"""

import argparse
import statistics
import time

import torch

from lissom.export import open_model
from lissom.kernels import extension, isa
from lissom.models import Model
from lissom.run.bench import llama_contender, some_tokens
from lissom.run.engine import Engine
from lissom.run.rounding import rounding


def run_engine(engine, prompt, new, greedy):
    engine.release()
    wall, cpu = time.perf_counter(), time.process_time()
    token = int(engine.prefill(prompt).argmax())
    wall1, cpu1 = time.perf_counter(), time.process_time()
    engine.decode(token, len(prompt), new, greedy)
    return {
        "prefill_s": wall1 - wall, "prefill_cpu_s": cpu1 - cpu,
        "decode_s": time.perf_counter() - wall1, "decode_cpu_s": time.process_time() - cpu1,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--forms", default="int4,6:16 int4,4:16 int4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llama-python")
    parser.add_argument("--llama-quantization", default="q4_0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    threads = [int(t) for t in options.threads.split(",")]
    context = options.prompt + options.new + 32

    model = Model(open_model(options.model))
    engines, runs = {}, {}
    for form in options.forms.split(","):
        codes = {}
        make = rounding(form)
        for t in threads:

            def cached(name, weight, codes=codes, make=make):
                if name not in codes:
                    codes[name] = make(name, weight)
                return codes[name]

            engines[form, t] = Engine(model, threads=t, context=context, compress=cached)
    rivals = {}
    if options.llama_python:
        for t in threads:
            rivals["llama.cpp " + options.llama_quantization, t] = llama_contender(
                options.model, t, context, options.llama_python, None, options.llama_quantization
            )
    greedy = extension.Sampling(0.0, 0, 1.0, 0.0, 1.0)
    prompt = some_tokens(options.prompt, next(iter(engines.values())).vocabulary)
    for repeat in range(options.repeats + 1):  # the first is a warm-up
        for key, engine in engines.items():
            result = run_engine(engine, prompt, options.new, greedy)
            runs.setdefault(key, []).extend([result] if repeat else [])
        for key, rival in rivals.items():
            result = rival.run(prompt, options.new)
            runs.setdefault(key, []).extend([result] if repeat else [])

    print(f"isa {isa()}, prompt {options.prompt}, new {options.new}, medians of {options.repeats}")
    print("| form | threads | MB/token | decode t/s | decode t/cpu-s | prefill t/s | prefill t/cpu-s |")
    print("|---|---|---|---|---|---|---|")
    for key, results in runs.items():
        middle = {k: statistics.median(r[k] for r in results) for k in results[0] if k.endswith("_s")}
        size = engines[key].bytes_per_token / 1e6 if key in engines else rivals[key].info["file_bytes"] / 1e6
        print(
            f"| {key[0]} | {key[1]} | {size:.1f} | {options.new / middle['decode_s']:.1f} "
            f"| {options.new / middle['decode_cpu_s']:.1f} | {options.prompt / middle['prefill_s']:.0f} "
            f"| {options.prompt / middle['prefill_cpu_s']:.0f} |"
        )
    for rival in rivals.values():
        rival.close()


if __name__ == "__main__":
    main()
