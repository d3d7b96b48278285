"""The table of architectures: one row of data per family, no code.

A row says how the tensors of a family are called, which layers share an input, and which of a few known forms each part
of the block has. The forward pass (:mod:`.forward`) and the list of expected tensors (:mod:`.layout`) read it.
Names are relative: outer tensors to ``prefixes``, block tensors to ``layer`` (``{}`` is the number of the block). A
string where a bool or a float could stand (``parallel``, ``qk_norm``, ``attention_cap`` …) names the attribute of the
transformers config that holds the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from ..core import CheckpointError

Named = tuple[tuple[str, str], ...]  # ((role, name of the module), …)

_QKV: Named = (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"))
_GATED: Named = (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"))


@dataclass(frozen=True)
class Architecture:
    """One family. ``types``: the ``model_type`` values of transformers configs that it covers."""

    name: str
    types: tuple[str, ...]

    # names; the first prefix is what transformers writes, files saved from the bare model lack it
    prefixes: tuple[str, ...] = ("model.", "")
    embed: str = "embed_tokens"
    layer: str = "layers.{}."
    attention: Named = _QKV
    o: str = "self_attn.o_proj"
    mlp: Named = _GATED
    down: str = "mlp.down_proj"
    final_norm: str | None = "norm"
    head: str | None = "lm_head"
    ignored: tuple[str, ...] = ()  # endings of buffers that old files carry

    # normalisation
    norm: Literal["layer", "rms", "rms+1"] = "rms"
    eps: str = "rms_norm_eps"
    norm_attention: str = "input_layernorm"
    norm_mlp: str = "post_attention_layernorm"
    norm_attention_out: str | None = None  # on the branch, before it is added
    norm_mlp_out: str | None = None
    norm_q: str | None = None
    norm_k: str | None = None
    qk_norm: bool | str = False
    norm_affine: bool | str = True
    pre_norm: bool | str = True  # False: the two norms come after the addition
    final_norm_off: bool | str = False
    residual_after_norm: bool | str = False  # BLOOM's option: the residual is the normalised input
    parallel: bool | str = False  # attention and MLP both read the block's input

    # attention
    causal: bool = True
    qkv: Literal["split", "heads"] = "split"  # fused rows: q then k then v, or (q, k, v) of head after head
    position: Literal["rotary", "learned", "alibi"] = "rotary"
    window: Literal["none", "all", "types"] = "none"  # sliding window: no layer, all, or as config.layer_types says
    rope_by_type: bool = False
    free_heads: bool = False  # the config has a head size of its own, so the number of heads may change
    branch_biases: tuple[str, ...] = ()  # config switches that give attention and MLP biases where they have none
    attention_cap: str | None = None
    query_scale: str | None = None  # config attribute s: scores are divided by √s instead of √head_dim
    scale_by_layer: bool | str = False

    # the rest
    activation: str = "hidden_act"  # the config attribute; its own name where the config has none
    inner: str = "intermediate_size"  # absent or None in the config: 4 × width
    transposed: bool = False  # Conv1D: stored (in, out)
    embed_scale: bool = False  # × √width
    embed_norm: str | None = None
    embed_positions: str | None = None
    position_offset: int = 0
    embed_types: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    head_cap: str | None = None

    def setting(self, config: Any, field: str) -> Any:
        """The value of ``field`` for this config: itself, or the config attribute that it names."""
        value = getattr(self, field)
        return getattr(config, value, None) if isinstance(value, str) else value


_GEMMA: dict[str, Any] = {
    "norm": "rms+1",
    "norm_attention_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
    "query_scale": "query_pre_attn_scalar",
    "window": "types",
    "attention_cap": "attn_logit_softcapping",
    "head_cap": "final_logit_softcapping",
    "activation": "hidden_activation",
    "embed_scale": True,
    "free_heads": True,
}
_QK: dict[str, Any] = {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm", "qk_norm": True}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(  # also SmolLM, TinyLlama, Yi
        "llama", ("llama",), free_heads=True, branch_biases=("attention_bias", "mlp_bias")
    ),
    Architecture("mistral", ("mistral",), window="all", free_heads=True),
    Architecture("qwen2", ("qwen2",), window="types", free_heads=True),
    Architecture("qwen3", ("qwen3",), window="types", free_heads=True, **_QK),
    Architecture("smollm3", ("smollm3",), window="types", free_heads=True),
    Architecture("gemma2", ("gemma2",), **_GEMMA),
    Architecture("gemma3", ("gemma3_text",), rope_by_type=True, **_GEMMA, **_QK),
    Architecture(
        "phi3",
        ("phi3",),
        attention=(("qkv", "self_attn.qkv_proj"),),
        mlp=(("gate_up", "mlp.gate_up_proj"),),
        window="all",
        free_heads=True,
    ),
    Architecture(
        "phi",
        ("phi",),
        o="self_attn.dense",
        mlp=(("up", "mlp.fc1"),),
        down="mlp.fc2",
        final_norm="final_layernorm",
        norm="layer",
        eps="layer_norm_eps",
        norm_mlp="input_layernorm",
        norm_q="self_attn.q_layernorm",
        norm_k="self_attn.k_layernorm",
        qk_norm="qk_layernorm",
        parallel=True,
        free_heads=True,
    ),
    Architecture(
        "opt",
        ("opt",),
        prefixes=("model.decoder.", "decoder.", ""),
        o="self_attn.out_proj",
        mlp=(("up", "fc1"),),
        down="fc2",
        final_norm="final_layer_norm",
        norm="layer",
        eps="layer_norm_eps",  # absent from OPT configs: 1e-5
        norm_attention="self_attn_layer_norm",
        norm_mlp="final_layer_norm",
        norm_affine="layer_norm_elementwise_affine",
        pre_norm="do_layer_norm_before",
        final_norm_off="_remove_final_layer_norm",
        position="learned",
        position_offset=2,
        activation="activation_function",
        inner="ffn_dim",
        embed_positions="embed_positions",
        project_in="project_in",
        project_out="project_out",
    ),
    Architecture(
        "bloom",
        ("bloom",),
        prefixes=("transformer.", ""),
        embed="word_embeddings",
        layer="h.{}.",
        attention=(("qkv", "self_attention.query_key_value"),),
        o="self_attention.dense",
        mlp=(("up", "mlp.dense_h_to_4h"),),
        down="mlp.dense_4h_to_h",
        final_norm="ln_f",
        norm="layer",
        eps="layer_norm_epsilon",
        residual_after_norm="apply_residual_connection_post_layernorm",
        qkv="heads",
        position="alibi",
        activation="gelu_new",
        embed_norm="word_embeddings_layernorm",
    ),
    Architecture(
        "gpt2",
        ("gpt2",),
        prefixes=("transformer.", ""),
        embed="wte",
        layer="h.{}.",
        attention=(("qkv", "attn.c_attn"),),
        o="attn.c_proj",
        mlp=(("up", "mlp.c_fc"),),
        down="mlp.c_proj",
        final_norm="ln_f",
        ignored=("attn.bias", "attn.masked_bias"),
        norm="layer",
        eps="layer_norm_epsilon",
        norm_attention="ln_1",
        norm_mlp="ln_2",
        position="learned",
        scale_by_layer="scale_attn_by_inverse_layer_idx",
        activation="activation_function",
        inner="n_inner",
        transposed=True,
        embed_positions="wpe",
    ),
    Architecture(
        "gpt_neox",  # Pythia
        ("gpt_neox",),
        prefixes=("gpt_neox.", ""),
        embed="embed_in",
        attention=(("qkv", "attention.query_key_value"),),
        o="attention.dense",
        mlp=(("up", "mlp.dense_h_to_4h"),),
        down="mlp.dense_4h_to_h",
        final_norm="final_layer_norm",
        head="embed_out",
        ignored=("attention.bias", "attention.masked_bias"),
        norm="layer",
        eps="layer_norm_eps",
        parallel="use_parallel_residual",
        qkv="heads",
    ),
    Architecture(
        "bert",  # sentence encoders such as all-MiniLM; no head
        ("bert",),
        prefixes=("bert.", ""),
        embed="embeddings.word_embeddings",
        layer="encoder.layer.{}.",
        attention=(("q", "attention.self.query"), ("k", "attention.self.key"), ("v", "attention.self.value")),
        o="attention.output.dense",
        mlp=(("up", "intermediate.dense"),),
        down="output.dense",
        final_norm=None,
        head=None,
        norm="layer",
        eps="layer_norm_eps",
        norm_attention="attention.output.LayerNorm",
        norm_mlp="output.LayerNorm",
        pre_norm=False,
        causal=False,
        position="learned",
        embed_norm="embeddings.LayerNorm",
        embed_positions="embeddings.position_embeddings",
        embed_types="embeddings.token_type_embeddings",
    ),
)


_EXTRA: ContextVar[tuple[Architecture, ...]] = ContextVar("rows of registered()", default=())


@contextmanager
def registered(*rows: Architecture) -> Iterator[None]:
    """Within this context, ``rows`` are looked up before the table."""
    token = _EXTRA.set((*rows, *_EXTRA.get()))
    try:
        yield
    finally:
        _EXTRA.reset(token)


def known_types() -> list[str]:
    """Every ``model_type`` that has a row."""
    return sorted({kind for row in (*_EXTRA.get(), *ARCHITECTURES) for kind in row.types})


def architecture_of(model_type: str) -> Architecture:
    """The row for a transformers ``model_type``; raises :class:`CheckpointError` with the nearest known one."""
    for row in (*_EXTRA.get(), *ARCHITECTURES):
        if model_type in row.types:
            return row
    near = get_close_matches(model_type, known_types(), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(
        f"unknown architecture {model_type!r} (config.json: model_type).{hint} Known: {', '.join(known_types())}. "
        "A new family is one row: see docs/architectures.md"
    )
