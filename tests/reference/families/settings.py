"""The tiny configuration of every family, in the words of `transformers`.

Small enough that a checkpoint and its outputs fit in 300 KB, and chosen so that every setting matters: windows shorter
than the prompts, soft caps near the values that they cap, wavelengths on both sides of every scaling threshold, heads
that do not divide the width, fewer key heads than query heads.
"""

from typing import Any

CHOSEN = 2  # experts per token
_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GEMMA = {**_DECODER, "num_key_value_heads": 1, "head_dim": 12}
_SANDWICH = {**_GEMMA, "num_hidden_layers": 4, "query_pre_attn_scalar": 10, "sliding_window": 4}
_EXPERTS = {**_GROUPED, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": CHOSEN}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _rope(kind: str = "default", theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


_LLAMA3 = _rope(
    "llama3", 100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
_YARN = _rope("yarn", 100.0, factor=4.0, beta_fast=1.0, beta_slow=0.25, original_max_position_embeddings=16)

# name: (model_type, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {**_DECODER, "rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "gpt_neox_sequential": (
        "gpt_neox",
        {**_DECODER, "use_parallel_residual": False, "rope_parameters": _rope(partial_rotary_factor=0.25)},
    ),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "llama": ("llama", {**_GROUPED, "rope_parameters": _rope()}),
    "llama_llama3": ("llama", {**_GROUPED, "head_dim": 16, "rope_parameters": _LLAMA3}),
    "llama_linear": ("llama", {**_GROUPED, "rope_parameters": _rope("linear", factor=4.0)}),
    "llama_yarn": ("llama", {**_GROUPED, "head_dim": 16, "rope_parameters": _YARN}),
    "mistral": ("mistral", {**_GROUPED, "head_dim": 12, "sliding_window": 4}),
    "smollm2": (
        "llama",
        {
            **_DECODER,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": _rope(theta=100_000.0),
        },
    ),
    "smollm3": ("smollm3", {**_GROUPED, "num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "qwen2": ("qwen2", {**_GROUPED, "rope_parameters": _rope(theta=1_000_000.0)}),
    "qwen2_sliding": (
        "qwen2",
        {
            **_GROUPED,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 12, "rope_parameters": _rope(theta=1_000_000.0)}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": (
        "gemma2",
        {**_SANDWICH, "num_key_value_heads": 2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_SANDWICH,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "rope_parameters": {_SLIDING: _rope(), _FULL: _rope("linear", 1_000_000.0, factor=8.0)},
        },
    ),
    "olmo2": ("olmo2", {**_GROUPED, "rope_parameters": _rope(theta=500_000.0)}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": 5, "rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 12, "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**_EXPERTS, "intermediate_size": 16, "norm_topk_prob": False}),
    "bert": ("bert", {**_DECODER, "hidden_act": "gelu"}),
    "vit": (
        "vit",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 7,
        },
    ),
}
