"""Peak memory against the depth of the model, and a model larger than the memory that it may use.

    .venv/bin/python benchmarks/memory.py [--width 512] [--blocks 2 4 8 16] [--write]

Random llamas of equal width and 2 … 16 blocks are written shard by shard and compressed in child processes;
peak RSS should not grow with the depth. Then a model four times deeper is compressed under a limit on private
memory (RLIMIT_DATA) of half its weights in fp32 beyond what the idle process has. `--write` puts the tables into benchmarks/MEMORY.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 – everything that a run imports is here before the first fork
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig  # noqa: F401
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import lissom
import lissom.pipeline

HERE = Path(__file__).parent


def forked(function: Callable[..., Any], *arguments: Any, limit: int = 0) -> Any:
    """``function(*arguments)`` in a child of its own, under ``limit`` bytes of private memory (0: none).

    A fork, so that libraries are imported once; the child's peak starts at the size that they have. Returns the result,
    or the exception.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            theirs.send(function(*arguments))
        except (Exception, MemoryError) as error:
            theirs.send(error)

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return RuntimeError("the child was killed")
    finally:
        process.join()


def own_memory() -> tuple[int, int]:
    """Resident and private bytes of this process."""
    with open("/proc/self/status") as file:
        found = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith(("VmRSS", "VmData"))
        }
    return found["VmRSS"], found["VmData"]


def run_dense(folder: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_llama(folder: Path, blocks: int, width: int, vocabulary: int) -> int:
    """A random llama in bfloat16, one shard a block, never whole in memory; returns its parameters."""
    folder.mkdir(parents=True)
    inner = 2 * width
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    placed: dict[str, str] = {}
    parameters = 0

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal parameters
        tensors = {
            k: (torch.randn(s, generator=generator) * s[-1] ** -0.5 if len(s) > 1 else torch.ones(s)).bfloat16()
            for k, s in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))
        parameters += sum(t.numel() for t in tensors.values())

    shard("outer.safetensors", {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)})
    for i in range(blocks):
        at = f"model.layers.{i}"
        shapes: dict[str, tuple[int, ...]] = {f"{at}.self_attn.{m}_proj.weight": (width, width) for m in "qkvo"}
        shapes |= {f"{at}.mlp.{m}_proj.weight": (inner, width) for m in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{at}.{m}_layernorm.weight": (width,) for m in ("input", "post_attention")}
        shard(f"block-{i:02d}.safetensors", shapes)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<unk>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    pick = torch.randint(vocabulary - 1, (20_000,), generator=generator)
    (folder / "calibration.text").write_text(" ".join(f"w{i}" for i in pick.tolist()))
    return parameters


def run_compress(source: Path, recipe: str) -> dict[str, Any]:
    out = source.with_name(source.name + "-out")
    overrides = ["samples=8", "length=128", f"calibration.data={source / 'calibration.text'}", "format=packed"]
    result = lissom.compress(source, out, recipe, overrides=overrides)
    shutil.rmtree(out)
    return {k: result[k] for k in ("peak_rss_bytes", "seconds", "verified")}


def compress(source: Path, recipe: str, limit: int = 0) -> dict[str, Any]:
    seen = forked(run_compress, source, recipe, limit=limit)
    if isinstance(seen, BaseException):
        raise SystemExit(f"compressing {source.name} failed: {seen!r}")
    return seen


def measure(blocks: list[int], width: int, vocabulary: int, recipe: str) -> str:
    work = Path(tempfile.mkdtemp(prefix="lissom-memory-"))
    lines = [
        f"Random llama, width {width}, vocabulary {vocabulary}, recipe `{recipe}`, 8 × 128 calibration tokens, one thread.",
        "",
    ]
    try:
        idle, private = forked(own_memory)
        lines += [
            f"A child with the same libraries that does nothing: {idle / 1e6:.0f} MB.", "",
            "| blocks | M parameters | fp32 MB | peak RSS MB | above idle MB | seconds |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        peaks: list[int] = []
        for n in blocks:
            source = work / f"blocks-{n}"
            parameters = forked(write_llama, source, n, width, vocabulary)
            seen = compress(source, recipe)
            peaks.append(seen["peak_rss_bytes"])
            lines.append(
                f"| {n} | {parameters / 1e6:.1f} | {4 * parameters / 1e6:.0f} | {peaks[-1] / 1e6:.0f} "
                f"| {(peaks[-1] - idle) / 1e6:.0f} | {seen['seconds']:.1f} |"
            )
            print(lines[-1], flush=True)
        ratio = max(peaks) / min(peaks)
        above = (max(peaks) - idle) / (min(peaks) - idle)
        lines += ["", f"Largest / smallest peak: {ratio:.3f}; of the part above the idle process: {above:.3f}.", ""]
        source = work / "large"
        dense = 4 * forked(write_llama, source, 4 * blocks[-1], width, vocabulary)
        limit = private + dense // 2
        seen = compress(source, "wanda", limit)
        refused = forked(run_dense, source, limit=limit)
        lines += [
            f"{4 * blocks[-1]} blocks, {dense / 1e6:.0f} MB in fp32, recipe `wanda`, under RLIMIT_DATA = {limit / 1e6:.0f} MB "
            f"({private / 1e6:.0f} MB of it are the idle process's own): compressed in {seen['seconds']:.1f} s, "
            f"{seen['verified']['layers']}; peak RSS {seen['peak_rss_bytes'] / 1e6:.0f} MB. "
            + (
                f"transformers' `from_pretrained(dtype=float32)` of the dense model fails under it ({type(refused).__name__})."
                if isinstance(refused, BaseException)
                else "transformers loads the dense model under the same limit as well: the limit proves nothing."
            ),
        ]
        print(lines[-1], flush=True)
        print(f"ratio {ratio:.3f}, above idle {above:.3f}", flush=True)
        if ratio > 1.1:
            print("NOT FLAT: the ratio is above 1.1", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--recipe", default="sparsegpt")
    parser.add_argument("--write", action="store_true", help="write benchmarks/MEMORY.md")
    options = parser.parse_args()
    text = measure(options.blocks, options.width, options.vocabulary, options.recipe)
    if options.write:
        command = " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]])
        (HERE / "MEMORY.md").write_text(f"# Peak memory\n\n    {command}\n\n{text}\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
