"""Qwen2 (2.5), with biases of queries, keys and values, and Qwen3, with norms of queries and keys instead."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.layer_types import (
    read_used_window,
    read_windows,
    write_layer_types,
    write_used_window,
)
from mi_jax.models.checkpoints.families.llama import IGNORED, VARIANTS, biases, sizes, table, write_sizes
from mi_jax.models.checkpoints.families.rope import read_rope, write_rope
from mi_jax.models.config import DecoderConfig

_DEFAULTS: dict[str, Any] = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "d_mlp": 22016}
_DEFAULTS |= {"d_vocab": 151936, "n_ctx": 32768}


def _shared(f: Fields, **defaults: Any) -> dict[str, Any]:
    shape = sizes(f, **_DEFAULTS, **defaults)
    n_layers = shape["n_layers"]
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    f.only("use_mrope", False, None)
    window, first = read_used_window(f), f.integer("max_window_layers", default=28)
    shape["windows"] = read_windows(f, n_layers, window, [bool(window) and i >= first for i in range(n_layers)])
    return shape | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": f.number("rms_norm_eps", default=1e-6),
        "activation": f.activation("hidden_act", default="silu"),
        "tied": f.flag("tie_word_embeddings", default=False),
    }


def _write_shared(config: DecoderConfig) -> dict[str, Any]:
    # versions without layer_types take the first layers without a window from here
    full = next((layer for layer, window in enumerate(config.windows) if window), config.n_layers)
    windows = {**write_used_window(config), **write_layer_types(config), "max_window_layers": full}
    return {**write_sizes(config), **write_rope(config), **windows}


def _read_qwen2(f: Fields) -> DecoderConfig:
    return DecoderConfig(**_shared(f), qkv_bias=True)


def _read_qwen3(f: Fields) -> DecoderConfig:
    return DecoderConfig(**_shared(f, d_head=128), **biases(f), qk_norm="head")


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_shared(config), "attention_bias": config.qkv_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_shared, table, IGNORED, VARIANTS)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, table, IGNORED, VARIANTS)
