"""Products of the packed forms, as ratios to dense int4 within one interleaved run.

.venv/bin/python benchmarks/kernels.py [--rows 8192] [--columns 4096]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lissom.core import NM, Codes, Sparse
from lissom.kernels import Form, Packed


def codes(rows: int, columns: int, bits: int, group: int = 64) -> Codes:
    """Random symmetric codes."""
    values = torch.randint(1, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows, columns // group).half().float() + 0.01
    return Codes(values, scale.half().float(), torch.full_like(scale, 2 ** (bits - 1)), bits, group)


def forms(rows: int, columns: int) -> dict[str, Packed]:
    out = {f"int{b}": Packed(codes(rows, columns, b), None, Form(f"int{b}")) for b in (4, 8, 3, 2)}
    score = torch.rand(rows, columns)
    for n in (2, 4, 6, 8):
        out[f"{n}:16 int4"] = Packed(codes(rows, columns, 4), NM(n, 16).select(score), Form("n:16 int4", n))
    out["2:4 int4"] = Packed(codes(rows, columns, 4), NM(2, 4).select(score), Form("2:4 int4", 8))
    for sparsity, slots in ((0.7, 6), (0.8, 6), (0.9, 4)):
        mask = Sparse(sparsity).select(score)
        name = f"unstructured {sparsity:.0%}, {slots} slots + spill"
        out[name] = Packed(codes(rows, columns, 4), mask, Form("n:16 int4", slots, True))
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = forms(options.rows, options.columns)
    for tokens, threads in ((1, 1), (1, 2), (64, 1)):
        x = torch.randn(tokens, options.columns)
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(7 if tokens == 1 else 3):
            for name, packed in made.items():
                start = time.perf_counter()
                packed.linear(x, threads)
                times[name].append(time.perf_counter() - start)
        base = statistics.median(times["int4"])
        for name, seen in times.items():
            middle = statistics.median(seen)
            speed = options.rows * options.columns * tokens / middle / 1e9
            print(
                f"{tokens:3} tokens {threads} threads  {name:34} {middle * 1e3:8.2f} ms {speed:7.1f} GMAC/s  ×{base / middle:.2f}"
            )


if __name__ == "__main__":
    main()
