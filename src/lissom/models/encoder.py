"""A BERT encoder as the plain record of weights that :mod:`lissom.methods.quantize.ibert_encoder` works on."""

from __future__ import annotations

from ..core import CheckpointError
from ..methods.quantize.ibert_encoder import Encoder
from .model import Model


def encoder_problem(model: Model) -> str | None:
    """Why ``model`` is no encoder of this kind, or None."""
    row, config = model.architecture, model.config
    if row.name != "bert":
        return f"{row.name} is not a BERT encoder: i-GELU, i-softmax and i-LayerNorm stand for BERT's operators"
    if getattr(config, "hidden_act", "gelu") != "gelu":
        return f"the activation is {config.hidden_act}, and i-GELU stands for gelu only"
    return "it has operators of its own" if model.operators else None


def encoder_of(model: Model) -> Encoder:
    """All float weights. Raises :class:`CheckpointError` where :func:`encoder_problem` has a reason."""
    if why := encoder_problem(model):
        raise CheckpointError(f"{model.checkpoint.source} cannot run in integers: {why}")
    row, outer = model.architecture, model.load_outer()
    at = {"word": row.embed, "position": row.embed_positions, "type": row.embed_types}
    embedding = {key: outer[f"{model.prefix}{module}.weight"] for key, module in at.items()}
    norm = f"{model.prefix}{row.embed_norm}"
    embedding |= {"gain": outer[f"{norm}.weight"], "bias": outer[f"{norm}.bias"]}
    layers = []
    for i in range(model.blocks):
        block = model.load_block(i)
        weights = {}
        for linear in block.linears:
            bias = block.bias(linear.name)
            weights |= {linear.role: block.weight(linear.name), f"{linear.role}.bias": bias}
        for key, module in (("norm1", row.norm_attention), ("norm2", row.norm_mlp)):
            name = block.prefix + module
            weights |= {
                f"{key}.gain": block.parameters[f"{name}.weight"],
                f"{key}.bias": block.parameters[f"{name}.bias"],
            }
        layers.append(weights)
    return Encoder(embedding, tuple(layers), model.config.num_attention_heads, float(getattr(model.config, row.eps)))
