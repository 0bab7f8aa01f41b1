"""Tiny random decoders that between them take every branch of the configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mi_jax.models import Decoder, DecoderConfig, init_decoder

_LLAMA = DecoderConfig(
    name="llama-like", n_layers=3, d_model=8, n_heads=4, n_kv_heads=2, d_head=6, d_mlp=10, d_vocab=13, n_ctx=12
)
CONFIGS = {
    # grouped heads, gated MLP, RMSNorm, rotary, tied
    "llama": _LLAMA,
    # one head per group, plain MLP, LayerNorm with biases, learned positions, untied
    "gpt2": dataclasses.replace(
        _LLAMA,
        name="gpt2-like",
        n_kv_heads=4,
        positions="learned",
        norm="layer",
        activation="gelu",
        gated=False,
        tied=False,
    ),
    # no MLP, no norm, no positions: linear but for the attention pattern
    "attention-only": dataclasses.replace(_LLAMA, name="toy", n_kv_heads=4, d_mlp=0, norm="none", positions="none"),
    # one key/value head for all, one layer, plain ReLU MLP
    "multi-query": dataclasses.replace(
        _LLAMA, name="mqa", n_layers=1, n_kv_heads=1, activation="relu", gated=False, tied=False, rope_theta=100.0
    ),
}


@functools.cache
def tiny(name: str = "llama") -> Decoder:
    """A model in which every weight is random, norms and biases included, so that none can be forgotten unseen."""
    # a first call inside a traced function must not keep that function's tracers
    with jax.ensure_compile_time_eval():
        model = init_decoder(CONFIGS[name], key=jax.random.key(1))
        leaves, treedef = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        noisy = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, noisy)


def prompts(seed: int, batch: int = 2, n_pos: int = 5, d_vocab: int = 13) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, n_pos), 0, d_vocab, jnp.int32)
