"""GPTQ files of lissom, read and run by GPTQModel: its logits beside lissom's.

    .venv/bin/python benchmarks/gptqmodel_logits.py PYTHON      # the python of an environment with gptqmodel and torch

A llama with random weights (2 blocks, width 128); each file is loaded by GPTQModel's own loader on the processor, in float16, which
is all that its torch kernel takes. Prints the largest difference as a share of the largest logit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOKENS = 32
FORMS = (("gptq", 4, True), ("gptq", 3, True), ("gptq", 8, True), ("gptq-v2", 4, False), ("gptq-v2", 2, False))


def write(folder: Path) -> None:
    """The artefacts, each with lissom's logits beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lissom.export import open_model
    from lissom.models import Model
    from lissom.pipeline import compress

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes))
    model.save_pretrained(folder / "dense")
    open_model("demo").tokenizer().save_pretrained(folder / "dense")
    for form, bits, symmetric in FORMS:
        out = folder / f"{form}, {bits} bits, {'symmetric' if symmetric else 'asymmetric'}"
        step = {"use": "gptq", "bits": bits, "group_size": 32, "symmetric": symmetric, "act_order": True}
        few = ["samples=2", "length=64", "calibration.data=builtin", f"save.format={form}"]
        compress(folder / "dense", out, [step], overrides=few)
        torch.save(Model(open_model(out)).forward(torch.arange(2, 2 + TOKENS)[None]), out / "logits.pt")


def read(folder: Path) -> None:
    """In the other environment."""
    from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]

    for out in sorted(p.parent for p in folder.glob("*/logits.pt")):
        theirs = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        with torch.no_grad():
            logits = theirs.model(input_ids=torch.arange(2, 2 + TOKENS)[None]).logits.float()
        ours = torch.load(out / "logits.pt")
        print(f"RESULT {out.name}: {float((logits - ours).abs().max() / ours.abs().max()):.2%}", flush=True)


def main() -> None:
    if sys.argv[1] == "--read":
        return read(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory(prefix="lissom-gptqmodel-") as folder:
        write(Path(folder))
        plain = dict(os.environ, TORCHDYNAMO_DISABLE="1", CUDA_VISIBLE_DEVICES="")
        command = [sys.argv[1], "-P", __file__, "--read", folder]  # -P: names of files here are those of packages
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        print("\n".join(found) if len(found) == len(FORMS) else done.stdout[-2000:] + done.stderr[-2000:])
        raise SystemExit(len(found) != len(FORMS))


if __name__ == "__main__":
    main()
