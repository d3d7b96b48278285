"""One job of another tool, run by that tool's own Python: `peers.py` starts it and measures it from outside.

    /work/peers/llmcompressor/bin/python -P benchmarks/peer_worker.py job.json      (-P: kernels.py beside it is no package)

``job.json``: ``tool``, ``method``, ``model`` (a dense Hugging Face directory), ``ids`` (.npy, samples × length), ``out``, ``seed``
and the method's numbers. Writes the compressed model to ``out`` and ``out``/peer.json: versions, seconds of the tool's call, and of all
its work from reading to writing, with the libraries imported before (`work`). Nothing of lissom is imported unless it is the tool, so that
memory and time are the tool's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROJECTIONS = "re:.*_proj$"  # ignore=["lm_head"] would leave the tied head in
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round", "torch-pruning", "lissom")


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, job.get("dtype", "float32"))
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype), AutoTokenizer.from_pretrained(job["model"])


def sparsegpt(job: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return [SparseGPTModifier(sparsity=job["sparsity"], mask_structure="0:0", targets=[PROJECTIONS])]


def owl(job: dict[str, Any]) -> list[Any]:
    """As shipped it stops: its look at the activations raises an event before the session has begun, and its dictionary of
    sparsities is then given whole to every layer. ``repair`` looks with a plain loop and hands a list."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    class Repaired(SparseGPTModifier):
        def _get_activations(self, model: Any, dataloader: Any, nsamples: int = 128) -> dict[str, torch.Tensor]:
            squares: dict[str, torch.Tensor] = {}

            def add(name: str):
                def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                    squares[name] = squares.get(name, 0) + inputs[0].float().square().sum((0, 1))

                return hook

            linears = [
                (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
            ]
            hooks = [module.register_forward_pre_hook(add(name)) for name, module in linears]
            with torch.no_grad():
                for batch in dataloader:
                    model.model(**batch)
            for hook in hooks:
                hook.remove()
            return {name: value.sqrt() for name, value in squares.items()}

        def _infer_owl_layer_sparsity(self, *arguments: Any) -> Any:
            return list(super()._infer_owl_layer_sparsity(*arguments).values())

    make = Repaired if job["repair"] else SparseGPTModifier
    return [
        make(
            sparsity=job["sparsity"], mask_structure="0:0", sparsity_profile="owl", owl_m=job["owl_m"],
            owl_lmbda=job["owl_lambda"], targets=["LlamaDecoderLayer"],
        )
    ]  # fmt: skip


def _groups(job: dict[str, Any]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=job["symmetric"], strategy="group", group_size=job["group_size"],
        **({"observer": job["observer"]} if "observer" in job else {}),
    )  # fmt: skip
    return {"config_groups": {"group_0": QuantizationScheme(targets=[PROJECTIONS], weights=weights)}}


def gptq(job: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return [GPTQModifier(**_groups(job))]


def awq(job: dict[str, Any]) -> list[Any]:
    """Without an accelerator it stops as shipped, pinning memory for one; here that call does nothing."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None
    return [AWQModifier(n_grid=job["grid"]), QuantizationModifier(**_groups(job))]


RECIPES = {"sparsegpt": sparsegpt, "owl": owl, "gptq": gptq, "awq": awq}


def llmcompressor(job: dict[str, Any], ids: torch.Tensor) -> float:
    from datasets import Dataset
    from llmcompressor import oneshot

    model, tokenizer = load(job)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    start = time.perf_counter()
    oneshot(
        model=model, processor=tokenizer, dataset=Dataset.from_dict(rows), recipe=RECIPES[job["method"]](job),
        num_calibration_samples=len(ids), max_seq_length=ids.shape[1], batch_size=job.get("batch", 1),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    model.half()  # as the input was stored; scales too
    model.save_pretrained(job["out"], save_compressed="bits" in job)
    tokenizer.save_pretrained(job["out"])
    return seconds


def autoround(job: dict[str, Any], ids: torch.Tensor) -> float:
    from auto_round import AutoRound

    model, tokenizer = load(job)
    batches = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=job.get("batch", 8))  # pyright: ignore
    start = time.perf_counter()
    made = AutoRound(
        model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], iters=job["iterations"],
        nsamples=len(ids), seqlen=ids.shape[1], batch_size=job.get("batch", 8), dataset=batches, seed=job["seed"],
        device_map="cpu",
    )  # fmt: skip
    made.quantize_and_save(job["out"], format=job.get("format", "llm_compressor"))
    return time.perf_counter() - start


def torch_pruning(job: dict[str, Any], ids: torch.Tensor) -> float:
    """The same fraction of MLP neurons out of every block: everything but gate_proj is left to follow."""
    import torch_pruning as tp

    model, tokenizer = load(job)
    model.config.use_cache = False
    score = tp.importance.RandomImportance() if job["method"] == "random" else tp.importance.MagnitudeImportance(p=2)
    mlps = [layer.mlp for layer in model.model.layers]
    roots = {mlp.gate_proj for mlp in mlps}
    kept = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding) and m not in roots]
    start = time.perf_counter()
    for mlp in mlps:  # their neurons depend on nothing outside, so the rest need not be traced
        pruner = tp.pruner.BasePruner(
            mlp, torch.zeros(1, 2, model.config.hidden_size), importance=score, pruning_ratio=job["remove"],
            ignored_layers=[m for m in kept if m is not mlp.up_proj],
        )  # fmt: skip
        pruner.step()
    seconds = time.perf_counter() - start
    model.config.intermediate_size = mlps[0].gate_proj.out_features
    model.half().save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    return seconds


def lissom(job: dict[str, Any], ids: torch.Tensor) -> float:
    """As the command line calls it; lissom draws the same ``ids`` from the text."""
    from lissom import compress

    Path(job["out"]).mkdir()
    start = time.perf_counter()
    compress(job["model"], Path(job["out"], "made"), job["method"], overrides=job["overrides"])
    return time.perf_counter() - start


TOOLS = {"llmcompressor": llmcompressor, "auto-round": autoround, "torch-pruning": torch_pruning, "lissom": lissom}
# what a tool imports on its way, the same transformers in all of them
IMPORTS = {
    "llmcompressor": ["llmcompressor", "llmcompressor.modifiers.pruning", "datasets"],
    "lissom": ["lissom.pipeline"],
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    ids = torch.from_numpy(np.load(job["ids"]))[: job.get("samples")]
    for name in ("transformers.models.llama.modeling_llama", *IMPORTS.get(job["tool"], [])):
        importlib.import_module(name)
    start = time.perf_counter()
    seconds = TOOLS[job["tool"]](job, ids)
    work = time.perf_counter() - start
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
    note = {"seconds": seconds, "work": work, "threads": torch.get_num_threads(), "versions": versions}
    Path(job["out"], "peer.json").write_text(json.dumps(note))


if __name__ == "__main__":
    main()
