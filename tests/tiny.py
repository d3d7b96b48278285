"""Tiny checkpoints for tests: random ones of every architecture, and a llama that is really trained."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 320

_LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_FULL = {**_LLAMA, "num_key_value_heads": 4}
_GEMMA = {
    **_LLAMA, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip

# kind → (name of the config class, settings); kinds beyond the model types show options of a family
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "LlamaConfig",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**_FULL, "rotary_pct": 0.5}),
    "gpt_neox-serial": ("GPTNeoXConfig", {**_FULL, "use_parallel_residual": False}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi": ("PhiConfig", {**_FULL, "partial_rotary_factor": 0.5}),
    "phi-qk-norm": ("PhiConfig", {**_LLAMA, "qk_layernorm": True}),
    "phi3": ("Phi3Config", {**_LLAMA, "sliding_window": 6, "original_max_position_embeddings": 128}),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "opt-350m": (
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom-odd": (
        "BloomConfig",
        {"hidden_size": 36, "n_layer": 2, "n_head": 6, "apply_residual_connection_post_layernorm": True},
    ),
    "bert": (
        "BertConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128},
    ),
}  # fmt: skip


@functools.cache
def corpus() -> str:
    """About 700 kB of English that every Python has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


@functools.cache
def tiny_tokenizer(vocab: int = VOCAB) -> Any:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens, trained on the start of :func:`corpus`."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([corpus()[:100_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build(kind: str, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model of ``kind`` in fp32, with norms and biases that matter."""
    import transformers

    name, settings = KINDS[kind]
    config = getattr(transformers, name)(
        **{"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, **settings, **overrides}
    )
    config._attn_implementation = "eager"
    cls = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model = cls.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:  # norms: keep the centre (1, or 0 for the 1 + w form and biases)
                parameter.add_(0.3 * noise)
    return model


def tiny_model(kind: str, path: Path | str, seed: int = 0, shard: str = "1GB", **overrides: Any) -> Any:
    """Save a tiny random checkpoint of ``kind`` (a key of :data:`KINDS`) with a tokenizer; returns the transformers model.

    ``shard``: largest shard ("20KB" gives several); ``overrides``: config values.
    """
    model = build(kind, seed, **overrides)
    model.save_pretrained(path, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(path)
    return model


def trained_tiny(path: Path | str, blocks: int = 4, width: int = 64, steps: int = 150, vocab: int = 512) -> Any:
    """Save a llama trained for a few seconds on :func:`corpus`, so that perplexity means something; returns the model.

    The last tenth of the corpus is not trained on.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    tokenizer = tiny_tokenizer(vocab)
    text = corpus()[: len(corpus()) * 9 // 10]
    ids = torch.tensor(tokenizer(text[:300_000]).input_ids)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(ids) - 65, (16,), generator=generator)
        batch = torch.stack([ids[i : i + 64] for i in at])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


# architecture in GGUF → kinds that tiny_gguf can write
GGUF_KINDS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "bloom": "bloom",
}


def tiny_gguf(architecture: str, file: Path | str, quantized: bool = False, **overrides: Any) -> Any:
    """Write a tiny random model as llama.cpp's converter would, with a tokenizer; returns the transformers model.

    ``quantized``: matrices whose width divides by 32 are stored as Q8_0.
    """
    import gguf
    import numpy as np
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    model = build(GGUF_KINDS[architecture], **overrides)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    more = {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"}
    for key, name in (more | GGUF_CONFIG_MAPPING[architecture]).items():
        value = config.rope_parameters.get("rope_theta") if name == "rope_theta" else getattr(config, name or "", None)
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if name in tied:
            continue
        value = _as_llama_cpp(architecture, config, name, tensor).contiguous().numpy()
        form = None
        if quantized and value.ndim == 2 and value.shape[1] % 32 == 0:
            form = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quants.quantize(value, form)
        stored = names.get_name(module) or names.get_name(module.removeprefix("transformer."))
        writer.add_tensor(f"{stored}.{kind}", np.ascontiguousarray(value), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _merges(tokenizer: Any) -> list[str]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [m if isinstance(m, str) else " ".join(m) for m in merges]


def _as_llama_cpp(architecture: str, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """llama.cpp's convert_hf_to_gguf.py: neighbouring rotary pairs, 1 + w norms, turned and regrouped matrices."""
    heads = config.num_attention_heads
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        n = heads if "q_proj" in name else config.num_key_value_heads
        return tensor.view(n, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and tensor.dim() == 2 and (".c_" in name):
        return tensor.T
    if architecture == "bloom" and "query_key_value" in name:
        return tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor
