"""Mixtures of experts: Qwen3-MoE and OLMoE, in which every layer has experts."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.layer_types import read_used_window, write_used_window
from mi_jax.models.checkpoints.families.llama import IGNORED, VARIANTS, biases, sizes, table, write_sizes
from mi_jax.models.checkpoints.families.rope import read_rope, write_rope
from mi_jax.models.config import DecoderConfig


def _shared(f: Fields, shape: dict[str, Any], *, experts: int, eps: float) -> dict[str, Any]:
    experts = f.integer("num_experts", "num_local_experts", default=experts)
    if experts < 1:
        raise f.wrong("num_experts", experts, "a positive number")
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    return {
        **shape,
        **biases(f),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": f.number("rms_norm_eps", default=eps),
        "activation": f.activation("hidden_act", default="silu"),
        "n_experts": experts,
        "n_active_experts": f.integer("num_experts_per_tok", default=8),
        "renormalize_experts": f.flag("norm_topk_prob", default=False),
        "tied": f.flag("tie_word_embeddings", default=False),
    }


def _write_shared(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "attention_bias": config.qkv_bias,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.n_active_experts,
        "norm_topk_prob": config.renormalize_experts,
    }


def _read_qwen3_moe(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=2048, n_layers=24, n_heads=32, n_kv_heads=4, d_mlp=6144, d_vocab=151936, n_ctx=32768)
    # intermediate_size is of the dense layers, which are refused here
    shape["d_mlp"] = f.integer("moe_intermediate_size", default=768)
    f.only("decoder_sparse_step", 1)
    f.only("mlp_only_layers", [], None)
    window = read_used_window(f)
    f.without_effect("max_window_layers")
    windows = (window,) * shape["n_layers"] if window else ()
    return DecoderConfig(**_shared(f, shape, experts=128, eps=1e-6), windows=windows, qk_norm="head")


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    own = {"moe_intermediate_size": config.d_mlp, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {**_write_shared(config), **write_used_window(config), **own}


def _read_olmoe(f: Fields) -> DecoderConfig:
    shape = sizes(
        f, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=None, d_mlp=2048, d_vocab=50304, n_ctx=4096, divided=True
    )
    f.only("clip_qkv", None)
    # the norms of queries and keys are as long as all heads would be if they shared out d_model
    f.only("head_dim", shape["d_model"] // shape["n_heads"], None)
    return DecoderConfig(**_shared(f, shape, experts=64, eps=1e-5), qk_norm="whole")


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, table, IGNORED, VARIANTS)
OLMOE = Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_shared, table, IGNORED, VARIANTS)
