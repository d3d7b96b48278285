"""A tiny llama on disk, and an artefact of it in any format."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from solving import pattern_name, solve

from lissom.core import NM, Grid, Sparse
from lissom.export import ArtefactWriter, Codec, Layout, open_model
from lissom.models import Model

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def artefact(tiny: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """``artefact(codec, grids, pattern, dtype)`` → directory and the solved weights by layer name."""

    def make(
        codec: Codec,
        grids: Sequence[Grid | None] = (None,),
        pattern: Sparse | NM | None = None,
        dtype: torch.dtype = torch.float32,
        out: str = "out",
    ) -> tuple[Path, dict[str, torch.Tensor]]:
        source = open_model(tiny)
        model = Model(source)
        writer = ArtefactWriter(tmp_path / out)
        solved_weights: dict[str, torch.Tensor] = {}
        layout = Layout(dtype, pattern_name(pattern))
        for i in range(model.blocks):
            block, entries = model.load_block(i), {}
            tensors = {name: value.to(dtype) for name, value in block.tensors().items()}
            for layer in model.linears(i):
                solved = solve(block.weight(layer.name), pattern, grids[len(solved_weights) % len(grids)])
                solved_weights[layer.name] = solved.weight
                del tensors[f"{layer.name}.weight"]
                tensors |= {f"{layer.name}.{k}": v for k, v in codec.encode(solved, layout).items()}
                entries[layer.name] = codec.entry(solved, layout)
            writer.add(f"block-{i:05d}", tensors, entries)
        writer.add("outer", {name: source.tensor(name).to(dtype) for name in model.outer_names()})
        writer.finish(source, dtype, codec.config(writer.entries(), layout))
        return writer.folder, solved_weights

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(34).reshape(2, 17) * 5 % 96
