"""Tiny random models, one for every structure that the families of models have between them."""

import dataclasses
import functools

import jax

from mi_jax.models.config import DecoderConfig, PatchConfig, RopeScaling
from mi_jax.models.decoder import Decoder
from mi_jax.models.parameters import init_decoder
from tests.models.tiny import prompts

_BASE = DecoderConfig(
    name="llama-like",
    n_layers=2,
    d_model=8,
    n_heads=4,
    n_kv_heads=2,
    d_head=4,
    d_mlp=6,
    d_vocab=13,
    n_ctx=16,
    rope_scaling=RopeScaling("llama3", 4.0, 8, 1.0, 4.0),
)
_PLAIN = dataclasses.replace(
    _BASE, n_kv_heads=4, rope_scaling=None, norm="layer", activation="gelu", gated=False, qkv_bias=True, o_bias=True
)
_PLAIN = dataclasses.replace(_PLAIN, mlp_bias=True)
_ENCODER = dataclasses.replace(_PLAIN, causal=False, positions="learned", activation="gelu_exact")

FAMILIES = {
    "llama": _BASE,
    "qwen2": dataclasses.replace(_BASE, name="qwen2-like", rope_scaling=None, qkv_bias=True, windows=(0, 3)),
    "gpt2": dataclasses.replace(_PLAIN, name="gpt2-like", positions="learned"),
    "neox": dataclasses.replace(
        _PLAIN, name="neox-like", parallel=True, rope_dim=2, activation="gelu_exact", tied=False
    ),
    "gptj": dataclasses.replace(
        _PLAIN,
        name="gptj-like",
        parallel=True,
        shared_norm=True,
        rope_dim=2,
        rope_adjacent=True,
        qkv_bias=False,
        o_bias=False,
        unembed_bias=True,
        tied=False,
    ),
    "gemma": dataclasses.replace(
        _BASE,
        name="gemma-like",
        rope_scaling=RopeScaling("linear", 8.0),
        rope_local_theta=50.0,
        windows=(3, 0),
        embed_scale=8**0.5,
        norm_offset=1.0,
        norms="sandwich",
        qk_norm="head",
        attn_scale=0.3,
        score_softcap=2.0,
        logit_softcap=5.0,
        activation="gelu",
    ),
    "olmo2": dataclasses.replace(_BASE, name="olmo2-like", norms="output", qk_norm="whole", tied=False),
    "mixture": dataclasses.replace(
        _BASE, name="olmoe-like", qk_norm="whole", n_experts=4, n_active_experts=2, renormalize_experts=False
    ),
    "bert": dataclasses.replace(
        _ENCODER, name="bert-like", norms="post", embed_norm=True, n_token_types=2, head="none"
    ),
    "vit": dataclasses.replace(
        _ENCODER, name="vit-like", patches=PatchConfig(4, 2), n_ctx=5, d_vocab=3, unembed_bias=True, tied=False
    ),
}
CAUSAL = tuple(name for name, config in FAMILIES.items() if config.causal)


def noisy(config: DecoderConfig) -> Decoder:
    """A model in which every weight is random, norms and biases included, so that none can be forgotten unseen."""
    # a first call inside a traced function must not keep that function's tracers
    with jax.ensure_compile_time_eval():
        model = init_decoder(config, key=jax.random.key(1))
        leaves, treedef = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        noise = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, noise)


@functools.cache
def family(name: str) -> Decoder:
    return noisy(FAMILIES[name])


def inputs(name: str, seed: int, batch: int = 2, n_pos: int = 6) -> jax.Array:
    """Tokens, or images where the model takes these."""
    config, key = FAMILIES[name], jax.random.key(seed)
    if config.patches is not None:
        shape = config.patches
        return jax.random.normal(key, (batch, shape.n_channels, shape.image_size, shape.image_size))
    return prompts(seed, batch, n_pos, config.d_vocab)
