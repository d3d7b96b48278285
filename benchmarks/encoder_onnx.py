"""Encoders in onnxruntime against the dense model and against lissom's own (simulated) result, on pieces of a text.

.venv/bin/python benchmarks/encoder_onnx.py OUT OUT.onnx --against demo-encoder --data TEXT
"""

import argparse
import json

import numpy as np
import onnxruntime
import torch

from lissom.evaluate import embeddings, load_text, pieces, tokenize, windows
from lissom.models import open_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source")
parser.add_argument("onnx")
parser.add_argument("--against", default="demo-encoder")
parser.add_argument("--data", default="builtin-heldout")
parser.add_argument("--windows", type=int, default=32)
parser.add_argument(
    "--exact", action="store_true", help="multiply four-bit blocks in fp32, not in int8 (onnxruntime's default)"
)
given = parser.parse_args()

tokenizer = open_checkpoint(given.against).tokenizer()
ids = pieces(tokenizer, windows(tokenize(tokenizer, load_text(given.data)), given.windows, 64))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if given.exact:
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(given.onnx, options, providers=["CPUExecutionProvider"])
feed = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
theirs = torch.from_numpy(session.run(["sentence_embedding"], feed)[0])
dense, ours = embeddings(given.against, ids), embeddings(given.source, ids)
upper = torch.triu(torch.ones(len(ids), len(ids), dtype=torch.bool), 1)


def moved(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    gap = (a @ a.T - b @ b.T).abs()[upper]
    return [round(float(gap.mean()), 5), round(float(gap.max()), 5)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    c = (a * b).sum(1)
    return [round(float(c.mean()), 5), round(float(c.min()), 5)]


print(
    json.dumps(
        {
            "model": given.source, "pieces": len(ids), "exact": given.exact,
            "cosine_onnx_dense": cosine(theirs, dense), "similarity_error_onnx_dense": moved(theirs, dense),
            "cosine_onnx_lissom": cosine(theirs, ours), "similarity_error_onnx_lissom": moved(theirs, ours),
        }
    )
)  # fmt: skip
