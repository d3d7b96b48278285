"""Perplexity and bytes of llama.cpp's own quantizations of the demo model, for the table of RUNTIME.md.

    .venv/bin/python benchmarks/equal_bytes.py --llama-python /work/peers/llamacpp/bin/python --data test.raw.txt

The half-precision GGUF comes from `lissom export`, the quantizations from llama.cpp's quantize (no importance matrix), and the perplexity
from `lissom evaluate` reading each GGUF (the blocks decoded by gguf's reference code): the same windows and the same forward pass
as for lissom's own artefacts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from lissom.models.gguf_header import read_gguf_header
from lissom.run.llama_worker import __file__ as worker

QUANTIZE = "import sys; sys.path.insert(0, sys.argv[1]); import llama_worker as w; w.quantized(*sys.argv[2:5])"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--types", default="Q2_K,Q3_K_M,Q4_0,Q4_K_M")
    parser.add_argument("--length", default="1024")
    parser.add_argument("--windows", default="16")
    options = parser.parse_args()
    lissom = str(Path(sys.executable).with_name("lissom"))
    with tempfile.TemporaryDirectory() as folder:
        dense = f"{folder}/f16.gguf"
        subprocess.run([lissom, "export", "demo", dense, "--type", "F16"], check=True)
        print("| type | MB | perplexity | tensors by block type |\n|---|---|---|---|", flush=True)
        for kind in options.types.split(","):
            out = f"{folder}/{kind}.gguf"
            subprocess.run(
                [options.llama_python, "-c", QUANTIZE, str(Path(worker).parent), dense, kind, out], check=True
            )
            evaluate = [lissom, "evaluate", out, "--data", options.data, "--length", options.length]
            done = subprocess.run([*evaluate, "--windows", options.windows, "--json"], capture_output=True, text=True)
            if done.returncode:
                print(f"| {kind} | {Path(out).stat().st_size / 1e6:.1f} | {done.stderr.strip()[-200:]} | |", flush=True)
                continue
            blocks = Counter(t.kind.name for t in read_gguf_header(Path(out)).tensors.values() if len(t.shape) > 1)
            mix = ", ".join(f"{n} {k}" for k, n in blocks.most_common())
            size = Path(out).stat().st_size / 1e6
            print(f"| {kind} | {size:.1f} | {json.loads(done.stdout)['perplexity']:.2f} | {mix} |", flush=True)


if __name__ == "__main__":
    main()
