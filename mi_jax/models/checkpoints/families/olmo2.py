"""OLMo 2: norms on what attention and MLP add to the stream, and of queries and keys over all heads together."""

from typing import Any

from mi_jax.models.checkpoints.families.family import Family
from mi_jax.models.checkpoints.families.fields import Fields
from mi_jax.models.checkpoints.families.llama import IGNORED, VARIANTS, biases, sizes, table, write_sizes
from mi_jax.models.checkpoints.families.rope import read_rope, write_rope
from mi_jax.models.config import DecoderConfig


def _read(f: Fields) -> DecoderConfig:
    shape = sizes(f, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=None, d_mlp=11008, d_vocab=50304, n_ctx=2048)
    theta, scaling, _ = read_rope(f, shape["n_ctx"])
    return DecoderConfig(
        **shape,
        **biases(f),
        rope_theta=theta,
        rope_scaling=scaling,
        norms="output",
        norm_eps=f.number("rms_norm_eps", default=1e-5),
        qk_norm="whole",
        activation=f.activation("hidden_act", default="silu"),
        tied=f.flag("tie_word_embeddings", default=False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {**write_sizes(config), **write_rope(config), "attention_bias": config.qkv_bias}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read, _write, table, IGNORED, VARIANTS)
