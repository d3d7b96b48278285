"""Decode and prefill speed of several forms beside llama.cpp's Q4_0, all interleaved in one run.

    flock /tmp/lissom.lock .venv/bin/python benchmarks/runtime.py --shape 0.6B --llama-python /tmp/llamacpp/bin/python

Models of random weights in the shape of the demo model or of a 0.6B one (benchmarks/synthetic.py). Medians of wall time, and
of processor time for one thread, which stays comparable on a machine that others use. Prints the rows of
benchmarks/RUNTIME.md. The share of the roofline is bytes of weights × tokens per second over the median of the read bandwidth measured between the runs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from synthetic import SHAPES, parts, write_gguf

from lissom.kernels.native import extension, isa
from lissom.run.bench import llama_contender, some_tokens
from lissom.run.engine import Engine

RIVAL = "llama.cpp Q4_0"
# as it comes, and with its weights in huge pages (glibc 2.35 or later), where lissom always puts them
RIVALS = {RIVAL: {}, f"{RIVAL}, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}


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
    parser.add_argument("--shape", default="demo-shape", choices=SHAPES)
    parser.add_argument("--forms", default="int4,6:16 int4,4:16 int4")
    parser.add_argument("--outer", default="int8", help="Form of the tied embedding and head: int8 or int6.")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llama-python")
    options = parser.parse_args()
    threads = [int(t) for t in options.threads.split(",")]
    context = options.prompt + options.new + 32
    shape = SHAPES[options.shape]

    engines, runs, rivals = {}, {}, {}
    for form in options.forms.split(","):
        made = parts(shape, form, options.outer)
        for t in threads:
            engines[form, t] = Engine(made, threads=t, context=context)
    with tempfile.TemporaryDirectory() as folder:
        if options.llama_python:
            file = str(write_gguf(shape, Path(folder) / "model.gguf"))
            for t in threads:
                for name, environment in RIVALS.items():
                    rivals[name, t] = llama_contender(
                        file, t, context, options.llama_python, None, "as-is", environment
                    )
        greedy = extension.Sampling(0.0, 0, 1.0, 0.0, 1.0)
        prompt = some_tokens(options.prompt, shape["vocabulary"])
        read_speeds = {t: [] for t in threads}  # beside the runs: on a shared machine it moves like they do
        for repeat in range(options.repeats + 1):  # the first is a warm-up
            for key, engine in engines.items():
                result = run_engine(engine, prompt, options.new, greedy)
                runs.setdefault(key, []).extend([result] if repeat else [])
            for key, rival in rivals.items():
                result = rival.run(prompt, options.new)
                runs.setdefault(key, []).extend([result] if repeat else [])
            for t in threads:
                read_speeds[t].append(extension.read_bandwidth(t, 256 << 20, 1))
        for rival in rivals.values():
            rival.close()

    bandwidth = {t: statistics.median(b) for t, b in read_speeds.items()}
    read = ", ".join(
        f"{t} thread{'s' * (t > 1)} {b / 1e9:.1f} GB/s (at best {max(read_speeds[t]) / 1e9:.1f})"
        for t, b in bandwidth.items()
    )
    print(f"{options.shape}, head {options.outer}, isa {isa()}, prompt {options.prompt}, new {options.new}, "
          f"medians of {options.repeats}; reading memory: {read}")  # fmt: skip
    print("| form | threads | MB/token | decode t/s | × | t/cpu-s | × | of bandwidth | prefill t/s | × | t/cpu-s | × |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for key, results in runs.items():
        middle = medians(results)
        base = medians(runs[RIVAL, key[1]]) if rivals else middle
        size = engines[key].bytes_per_token if key in engines else rivals[key].info["file_bytes"]
        cells = []
        for kind, count in (("decode", options.new), ("prefill", options.prompt)):
            for clock in ("s", "cpu_s"):
                name = f"{kind}_{clock}"
                cells += [f"{count / middle[name]:.1f}", f"{base[name] / middle[name]:.2f}"]
        cells.insert(4, f"{size * options.new / middle['decode_s'] / bandwidth[key[1]]:.0%}")
        print(f"| {key[0]} | {key[1]} | {size / 1e6:.1f} | {' | '.join(cells)} |")


def medians(results):
    return {k: statistics.median(r[k] for r in results) for k in results[0] if k.endswith("_s")}


if __name__ == "__main__":
    main()
