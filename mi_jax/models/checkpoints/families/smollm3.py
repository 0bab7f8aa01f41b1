"""SmolLM3: like Llama, without rotary positions in every fourth layer."""

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


def _read(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=4, d_mlp=11008, d_vocab=128256, n_ctx=32768)
    n_layers = shape["n_layers"]
    theta, scaling, _ = read_rope(f, shape["n_ctx"], theta=2_000_000.0)
    every, listed = f.integer("no_rope_layer_interval", default=4), f.several("no_rope_layers")
    if every < 1:
        raise f.wrong("no_rope_layer_interval", every, "a positive number")
    # the name says the opposite of what a 1 means: this layer turns its queries and keys
    turns = tuple((layer + 1) % every != 0 for layer in range(n_layers)) if listed is None else listed
    if len(turns) != n_layers or any(each not in (0, 1) for each in turns):
        raise f.wrong("no_rope_layers", list(turns), f"{n_layers} times 0 or 1")
    window = read_used_window(f)
    f.without_effect("max_window_layers")
    return DecoderConfig(
        **shape,
        **biases(f),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_layers=() if all(turns) else tuple(bool(each) for each in turns),
        windows=read_windows(f, n_layers, window, [bool(window) and not each for each in turns]),
        norm_eps=f.number("rms_norm_eps", default=1e-6),
        activation=f.activation("hidden_act", default="silu"),
        mlp_bias=f.flag("mlp_bias"),
        tied=f.flag("tie_word_embeddings", default=True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    turns = config.rope_layers or (True,) * config.n_layers
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias, "no_rope_layers": [int(t) for t in turns]}
    return {
        **write_sizes(config),
        **write_rope(config),
        **write_used_window(config),
        **write_layer_types(config),
        **own,
    }


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read, _write, table, IGNORED, VARIANTS)
