"""Other tools beside lissom: same dense checkpoint, same calibration tokens, same evaluation of what was saved.

    .venv/bin/python benchmarks/peers.py [--model demo] [--only PATTERN] [--threads 2] [--again] [--render]

Each peer lives in an environment of its own under ``--peers`` (default /work/peers):

    python3 -m venv /work/peers/llmcompressor
    /work/peers/llmcompressor/bin/pip install torch==2.13.0
    /work/peers/llmcompressor/bin/pip install llmcompressor==0.14.0.1     # brings transformers 5.17.0, compressed-tensors 0.19.0
    python3 -m venv /work/peers/auto-round
    /work/peers/auto-round/bin/pip install torch==2.13.0
    /work/peers/auto-round/bin/pip install auto-round==0.16.1 compressed-tensors==0.20.0   # brings transformers 5.24.0
    python3 -m venv /work/peers/torch-pruning
    /work/peers/torch-pruning/bin/pip install torch==2.13.0
    /work/peers/torch-pruning/bin/pip install torch-pruning==1.6.1 transformers==5.24.0

Calibration: the token ids that lissom draws (32 × 512 of WikiText-2 valid, seed 0), handed over as an array; whether a
lissom run used exactly these is checked by their hash. Evaluation: `lissom evaluate OUT`, 16 × 1024 tokens of the raw test.
Seconds are of the whole process, start to exit (imports, reading, writing and – lissom – loading back included), and so is the peak of
resident memory. Finished rows are kept in benchmarks/rows/peers/; ``--again`` measures them anew. Rows of one call share their
``run``, and only those may be compared in time. ``--wrap "slot --quiet --"`` puts a queue before each measured process, whose
waiting is not counted; ``--wrap-evaluate`` before each evaluation; ``--at-once 3`` hands three rows to the queue together.
``--render`` writes the table into RESULTS.md. ``--model 0.6B``: the demo model's architecture and tokenizer at another size
(`synthetic.SHAPES`) with random weights, for times alone; rows in benchmarks/rows/peers-0.6B/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from main_table import DATA, HERE, LISSOM, calibration, evaluation_on
from study import into_results
from synthetic import HEAD_DIM, SHAPES

from lissom.evaluate import fingerprint, load_text, samples, tokenize
from lissom.export import open_model

ROWS = HERE / "rows" / "peers"
GROUP = 64  # 128 does not divide the model's 576 inputs, which llm-compressor asks for


def peer_rows() -> dict[str, dict[str, Any]]:
    """Row name → the job for `peer_worker.py`."""
    out: dict[str, dict[str, Any]] = {}
    prune = {"tool": "llmcompressor", "method": "sparsegpt"}
    for sparsity in (0.7, 0.5, 0.6, 0.8):
        out[f"llm-compressor SparseGPT {sparsity:.0%}"] = prune | {"sparsity": sparsity}
    owl = prune | {"method": "owl", "owl_m": 5, "owl_lambda": 0.08}
    out["llm-compressor OWL 70% as shipped"] = owl | {"sparsity": 0.7, "repair": False}
    for sparsity in (0.7, 0.5, 0.6, 0.8):
        out[f"llm-compressor OWL {sparsity:.0%} repaired"] = owl | {"sparsity": sparsity, "repair": True}
    for bits in (3, 4):
        grid = {"bits": bits, "group_size": GROUP}
        compressor = {"tool": "llmcompressor", **grid}
        out[f"llm-compressor GPTQ W{bits} sym"] = compressor | {"method": "gptq", "symmetric": True}
        out[f"llm-compressor GPTQ W{bits} asym"] = compressor | {"method": "gptq", "symmetric": False}
        out[f"llm-compressor AWQ W{bits} asym"] = compressor | {"method": "awq", "symmetric": False, "grid": 20}
        for symmetric, word in ((True, "sym"), (False, "asym")):
            rounds = {
                "tool": "auto-round",
                "method": "autoround",
                **grid,
                "symmetric": symmetric,
                "iterations": 20,
                "batch": 4,
            }
            out[f"AutoRound W{bits} {word}, 20 iterations of 4"] = rounds
            out[f"AutoRound W{bits} {word}, 200 iterations of 4"] = rounds | {"iterations": 200}
    overrides = [f"calibration.data={DATA / 'valid.txt'}", "samples=32", "length=512", "sparsity=0.7"]
    out["lissom sparsegpt 70%, called"] = {"tool": "lissom", "method": "sparsegpt", "overrides": overrides}
    for method in ("random", "magnitude"):
        job = {"tool": "torch-pruning", "method": method, "remove": 320 / 1536}  # what lissom rounds 20% to
        out[f"Torch-Pruning {method}, 20% of the neurons"] = job
    return out


def lissom_rows() -> dict[str, list[str]]:
    """Row name → arguments of `lissom compress DENSE OUT`."""
    out: dict[str, list[str]] = {}
    for sparsity in (0.7, 0.5, 0.6, 0.8):
        value = f"sparsity={sparsity}"
        out[f"lissom sparsegpt {sparsity:.0%}"] = ["--recipe", "sparsegpt", "--set", value]
        whole = ["--set", "bits=16", "--set", "embedding_bits=16"]
        out[f"lissom aggressive {sparsity:.0%}"] = ["--recipe", "aggressive", "--set", value, *whole]
    ordered = ["act_order=true", "range=mse"]
    recipes: dict[str, tuple[str, list[str]]] = {
        "YAQA": ("int3", []),
        "YAQA, no drift made up for": ("int3", ["drift=0"]),
        "GPTQ": ("gptq", [*ordered, "token_fisher=0.5"]),
        "descent": ("gptq-descent", []),
        "descent, tokens weighed": ("gptq-descent", ["token_fisher=0.5"]),
        "autoround": ("autoround", []),
        "autoround of 60 iterations, tokens weighed": ("autoround", ["iterations=60", "token_fisher=0.5"]),
        "GPTQ, tokens alike": ("gptq", ordered),
        "GPTQ + reconstruct": ("int3-healed", ["epochs=2"]),
        "GPTQ + reconstruct, 8 epochs": ("int3-healed", []),
    }
    for bits in (3, 4):
        for symmetric, word in (("true", "sym"), ("false", "asym")):
            for name, (recipe, more) in recipes.items():
                sets = [f"bits={bits}", f"group_size={GROUP}", f"symmetric={symmetric}", *more]
                whole = [a for s in sets for a in ("--set", s)]
                out[f"lissom {name} W{bits} {word}"] = ["--recipe", recipe, *whole, "--format", "packed"]
    for method in ("random", "structured-magnitude", "flap"):
        out[f"lissom {method}, 20% of the neurons"] = ["--recipe", str(HERE / "recipes" / f"neurons-{method}.yaml")]
    return out


def random_model(like: Path, name: str, out: Path) -> None:
    """The architecture and tokenizer of the directory ``like`` at another size, weights by transformers' own start."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = SHAPES[name]
    config = AutoConfig.from_pretrained(
        like, num_hidden_layers=shape["layers"], hidden_size=shape["width"], intermediate_size=shape["inner"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], head_dim=HEAD_DIM,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config).half()
    model.cpu().save_pretrained(out)
    AutoTokenizer.from_pretrained(like).save_pretrained(out)


def names() -> list[str]:
    return [*peer_rows(), *lissom_rows()]


def measured(command: list[str], wrap: list[str], threads: int, work: Path) -> dict[str, Any]:
    """Runs ``command``; wall seconds and peak bytes of it alone, or ``error``, the last line that it wrote."""
    note, log = work / "measured.json", work / "log.txt"
    environment = dict(os.environ, TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(log, "w") as file:
        subprocess.run(
            [*wrap, sys.executable, str(HERE / "measured.py"), str(note), *command],
            stdout=file, stderr=subprocess.STDOUT, env=environment, check=True,
        )  # fmt: skip
    found = json.loads(note.read_text())
    if found.pop("returncode"):
        found["error"] = log.read_text().strip().splitlines()[-1]
    return found


def run(name: str, options: argparse.Namespace, dense: Path, ids: Path, work: Path) -> dict[str, Any]:
    out = work / "out"
    wrap = shlex.split(options.wrap)
    if name in peer_rows():
        job = peer_rows()[name] | {"model": str(dense), "ids": str(ids), "out": str(out), "seed": 0}
        (work / "job.json").write_text(json.dumps(job))
        python = sys.executable if job["tool"] == "lissom" else options.peers / job["tool"] / "bin" / "python"
        command = [str(python), "-P", str(HERE / "peer_worker.py"), str(work / "job.json")]
        row: dict[str, Any] = {"name": name, "job": peer_rows()[name]}
    else:
        arguments = lissom_rows()[name]
        command = [LISSOM, "compress", str(dense), str(out), *arguments, *calibration(), "--json"]
        row = {"name": name, "command": "lissom compress DENSE OUT " + " ".join(arguments)}
    row |= measured(command, wrap, options.threads, work) | {"threads": options.threads}
    if "error" in row:
        return row
    if name in peer_rows():
        row["peer"] = json.loads(next(out.rglob("peer.json")).read_text())
        out = next(out.rglob("config.json")).parent
        if (timings := out / "timings.json").exists():
            row["stages"] = json.loads(timings.read_text())
    else:
        manifest = json.loads((out / "manifest.json").read_text())
        row["stages"] = json.loads((out / "timings.json").read_text())
        row["same_tokens"] = manifest["calibration"]["hash"] == fingerprint(torch.from_numpy(np.load(ids)))
    if options.model != "demo":
        return row
    judge = [LISSOM, "evaluate", str(out), *evaluation_on("test.raw.txt"), "--json"]
    done = subprocess.run([*shlex.split(options.wrap_evaluate), *judge], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(judge)} failed:\n{done.stderr[-3000:]}")
    return row | {"evaluate": json.loads(done.stdout)}


def render() -> None:
    found = {r["name"]: r for r in (json.loads(p.read_text()) for p in ROWS.glob("*.json"))}
    lines = ["| run | perplexity | MB on disk | seconds | peak MB | threads | run at |", "|---" * 7 + "|"]
    for name in names():
        if not (row := found.get(name)):
            continue
        seen = row.get("evaluate")
        judged = f"{seen['perplexity']:.2f} | {seen['bytes'] / 1e6:.1f}" if seen else f"stops: {row['error'][:90]} |"
        lines.append(
            f"| {name} | {judged} | {row['wall_s']:.0f} | {row['peak_rss_bytes'] / 1e6:.0f} | {row['threads']} | {row['run']} |"
        )
    into_results("peers", lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", type=Path, default=Path("/work/peers"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wrap", default="")
    parser.add_argument("--wrap-evaluate", default="")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.render:
        return render()
    rows = ROWS if options.model == "demo" else ROWS.with_name(f"peers-{options.model}")
    rows.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now().isoformat(timespec="minutes")
    base = Path(tempfile.mkdtemp(prefix="lissom-peers-"))
    try:
        dense, ids = base / "dense", base / "ids.npy"
        subprocess.run([LISSOM, "unpack", "demo", str(dense)], check=True)
        if options.model != "demo":
            random_model(dense, options.model, base / options.model)
            dense = base / options.model
        tokens = tokenize(open_model(dense).tokenizer(), load_text(str(DATA / "valid.txt")))
        np.save(ids, samples(tokens, 32, 512, 0).numpy())
        paths = {n: rows / (re.sub(r"[^a-z0-9]+", "-", n.lower()).strip("-") + ".json") for n in names()}
        chosen = [n for n in names() if re.search(options.only, n) and (options.again or not paths[n].exists())]

        def one(name: str) -> None:
            work = base / paths[name].stem
            work.mkdir()
            row = run(name, options, dense, ids, work) | {"run": started}
            shutil.rmtree(work)
            paths[name].write_text(json.dumps(row, indent=1) + "\n")
            print(name, row.get("evaluate", row).get("perplexity", row.get("error")), row["wall_s"], flush=True)

        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(one, chosen))
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
