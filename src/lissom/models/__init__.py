"""Architectures as data, checkpoints read lazily, and the staged forward pass of one block."""

from .architectures import ARCHITECTURES, Architecture, architecture_of, known_types, registered
from .checkpoint import Checkpoint, DirectoryCheckpoint, demo_file, fingerprint, load_tokenizer, open_checkpoint
from .encoder import encoder_of, encoder_problem
from .forward import Block, Linear, Run
from .model import Model
from .operators import BlockOperators, InputGrid, Operators
from .validate import tensor_problems

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "BlockOperators",
    "Checkpoint",
    "DirectoryCheckpoint",
    "InputGrid",
    "Linear",
    "Model",
    "Operators",
    "Run",
    "architecture_of",
    "demo_file",
    "encoder_of",
    "encoder_problem",
    "fingerprint",
    "known_types",
    "load_tokenizer",
    "open_checkpoint",
    "registered",
    "tensor_problems",
]
