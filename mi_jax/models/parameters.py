"""The parameters of a decoder: random ones, their shapes alone, and the names of their axes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mi_jax.models.attention import Attention
from mi_jax.models.block import Block
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.embedding import Patches
from mi_jax.models.mlp import MLP, Experts
from mi_jax.models.norm import Norm


def init_decoder(config: DecoderConfig, *, key: PRNGKeyArray, dtype=jnp.float32) -> Decoder:
    """Random weights, normal with variance 1/fan_in; those that write to the stream are scaled by 1/sqrt(2·layers)."""
    c, n, d, f, h = config, config.n_layers, config.d_model, config.d_mlp, config.d_head
    keys = iter(jax.random.split(key, 12))

    def normal(*shape, fan_in, gain=1.0):
        return gain * fan_in**-0.5 * jax.random.normal(next(keys), shape, dtype)

    def zeros(on: bool, *shape):
        return jnp.zeros(shape, dtype) if on else None

    def norm(*shape, layer: bool = c.norm == "layer"):
        weight = None if c.norm == "none" else jnp.full(shape, 1.0 - c.norm_offset, dtype)
        return Norm(weight, zeros(layer, *shape), c.norm_eps, c.norm_offset)

    def head_norm(heads: int):
        if c.qk_norm == "none":
            return None
        return norm(n, heads, h, layer=False) if c.qk_norm == "whole" else norm(n, h, layer=False)

    out = (2 * n) ** -0.5
    attn = Attention(
        q=normal(n, d, c.n_heads, h, fan_in=d),
        k=normal(n, d, c.n_kv_heads, h, fan_in=d),
        v=normal(n, d, c.n_kv_heads, h, fan_in=d),
        o=normal(n, c.n_heads, h, d, fan_in=c.n_heads * h, gain=out),
        q_bias=zeros(c.qkv_bias, n, c.n_heads, h),
        k_bias=zeros(c.qkv_bias, n, c.n_kv_heads, h),
        v_bias=zeros(c.qkv_bias, n, c.n_kv_heads, h),
        o_bias=zeros(c.o_bias, n, d),
        q_norm=head_norm(c.n_heads),
        k_norm=head_norm(c.n_kv_heads),
    )
    mlp, e = None, c.n_experts
    if e:
        mlp = Experts(
            router=normal(n, d, e, fan_in=d),
            gate=normal(n, e, d, f, fan_in=d),
            up=normal(n, e, d, f, fan_in=d),
            down=normal(n, e, f, d, fan_in=f, gain=out),
        )
    elif f:
        mlp = MLP(
            gate=normal(n, d, f, fan_in=d) if c.gated else None,
            up=normal(n, d, f, fan_in=d),
            down=normal(n, f, d, fan_in=f, gain=out),
            gate_bias=zeros(c.mlp_bias and c.gated, n, f),
            up_bias=zeros(c.mlp_bias, n, f),
            down_bias=zeros(c.mlp_bias, n, d),
        )
    before, after = c.norms in ("pre", "sandwich"), c.norms != "pre"
    blocks = Block(
        attn_norm=norm(n, d) if before else None,
        attn=attn,
        mlp_norm=norm(n, d) if before and f and not c.shared_norm else None,
        mlp=mlp,
        attn_post_norm=norm(n, d) if after else None,
        mlp_post_norm=norm(n, d) if after and f else None,
    )
    patches = None
    if c.patches is not None:
        area = (c.patches.n_channels, c.patches.patch_size, c.patches.patch_size)
        patches = Patches(normal(*area, d, fan_in=math.prod(area)), jnp.zeros(d, dtype), jnp.zeros(d, dtype))
    return Decoder(
        config=c,
        embed=None if c.patches is not None else normal(c.d_vocab, d, fan_in=d),
        pos_embed=normal(c.n_ctx, d, fan_in=d) if c.positions == "learned" else None,
        blocks=blocks,
        final_norm=None if c.norms == "post" else norm(d),
        unembed=None if c.tied or c.head == "none" else normal(c.d_vocab, d, fan_in=d),
        unembed_bias=zeros(c.unembed_bias, c.d_vocab),
        type_embed=normal(c.n_token_types, d, fan_in=d) if c.n_token_types else None,
        embed_norm=norm(d) if c.embed_norm else None,
        patches=patches,
    )


def abstract_decoder(config: DecoderConfig, dtype=jnp.float32) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`: its parameters' shapes without their memory."""
    return jax.eval_shape(lambda key: init_decoder(config, key=key, dtype=dtype), jax.random.key(0))


_HEADS, _KV_HEADS = ("layer", "d_model", "head", "d_head"), ("layer", "d_model", "kv_head", "d_head")
_IN, _OUT = ("layer", "d_model", "d_mlp"), ("layer", "d_mlp", "d_model")
_AXES = {
    ".embed": ("d_vocab", "d_model"),
    ".unembed": ("d_vocab", "d_model"),
    ".unembed_bias": ("d_vocab",),
    ".pos_embed": ("pos", "d_model"),
    ".type_embed": (None, "d_model"),
    ".patches.weight": (None, None, None, "d_model"),
    ".attn.q": _HEADS,
    ".attn.k": _KV_HEADS,
    ".attn.v": _KV_HEADS,
    ".attn.o": ("layer", "head", "d_head", "d_model"),
    ".attn.q_bias": ("layer", "head", "d_head"),
    ".attn.k_bias": ("layer", "kv_head", "d_head"),
    ".attn.v_bias": ("layer", "kv_head", "d_head"),
    ".mlp.gate": _IN,
    ".mlp.up": _IN,
    ".mlp.down": _OUT,
    ".mlp.gate_bias": ("layer", "d_mlp"),
    ".mlp.up_bias": ("layer", "d_mlp"),
}
_EXPERT_AXES = {
    ".mlp.router": ("layer", "d_model", None),
    ".mlp.gate": ("layer", "expert", "d_model", "d_mlp"),
    ".mlp.up": ("layer", "expert", "d_model", "d_mlp"),
    ".mlp.down": ("layer", "expert", "d_mlp", "d_model"),
}
_HEAD_NORMS = {".attn.q_norm.weight": "head", ".attn.k_norm.weight": "kv_head"}


def logical_axes(model: Decoder) -> Decoder:
    """The axis names of every parameter, in the structure of the model; `mi.core.sharding.shard` takes them."""
    table = _AXES | (_EXPERT_AXES if model.config.n_experts else {})

    def names(path, x):
        key = jax.tree_util.keystr(path).removeprefix(".blocks")
        if key in _HEAD_NORMS:
            return ("layer", _HEAD_NORMS[key], "d_head")[:: 1 if x.ndim == 3 else 2]
        return table[key] if key in table else ("layer", "d_model")[-x.ndim :]

    return jax.tree_util.tree_map_with_path(names, model)
