"""How much of every part that is written to the stream lies along a direction, whatever norms it goes through.

With its scale taken from the run a norm is an affine map, so instead of the parts the direction can go through it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.features.lens import in_float32
from mi_jax.models.block import Block
from mi_jax.models.decoder import Decoder
from mi_jax.models.embedding import embed_tokens, places
from mi_jax.models.mlp import MLP
from mi_jax.models.norm import Norm


def through(norm: Norm | None, d: Array, x: Array) -> tuple[Array, Array, Array]:
    """The direction that x has to be multiplied with for `norm(x) · d`, what the bias adds, and the scale of the run.

    Args:
      x: what the norm reads, in float32 or better.
    """
    zero, one = jnp.zeros(d.shape[:2], d.dtype), jnp.ones(d.shape[:2], d.dtype)
    if norm is None or norm.weight is None:
        return d, zero, one
    bias = zero if norm.bias is None else d @ in_float32(norm.bias)
    d = d * (in_float32(norm.weight) + norm.offset)[None, None, :]
    if norm.bias is not None:
        d, x = d - d.mean(-1, keepdims=True), x - x.mean(-1, keepdims=True)
    scale = jnp.sqrt(jnp.square(x).mean(-1) + norm.eps)
    return d / scale[..., None], bias, scale


def embedding_parts(
    decoder: Decoder, tokens: Array, mask: Array | None, token_types: Array | None, output_pos: Array | None, d: Array
) -> dict[str, Array]:
    """The parts of what the stream starts with."""
    types = jnp.zeros_like(tokens) if token_types is None else token_types
    positions = places(jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool))
    if output_pos is not None:
        tokens, types, positions = (
            jnp.take_along_axis(x, output_pos[:, None], axis=1) for x in (tokens, types, positions)
        )
    # the token embedding as the model scales it, without the other tables
    assert decoder.embed is not None
    rows = {"embed": embed_tokens(decoder.config, decoder.embed, tokens)}
    if decoder.pos_embed is not None:
        rows["position"] = decoder.pos_embed[positions]
    if decoder.type_embed is not None:
        rows["token_type"] = decoder.type_embed[types]
    rows = {name: in_float32(x) for name, x in rows.items()}
    d, bias, _ = through(decoder.embed_norm, d, sum(rows.values(), jnp.zeros_like(d)))
    zero = jnp.zeros(d.shape[:2], d.dtype)
    parts = {name: along(rows[name], d) if name in rows else zero for name in ("embed", "position", "token_type")}
    return parts | {"embed_bias": bias}


def along(x: Float[Array, "*layer batch pos d_model"], d: Array) -> Float[Array, "*layer batch pos"]:
    """The product with the direction, at every position."""
    return jnp.einsum("...bpd,bpd->...bp", in_float32(x), d)


def mlp_bias_needs_run(decoder: Decoder) -> bool:
    """Whether what the bias of the MLP adds depends on the run, by a norm that it goes through."""
    p, norm = decoder.blocks.mlp, decoder.blocks.mlp_post_norm
    return isinstance(p, MLP) and p.down_bias is not None and norm is not None and norm.weight is not None


def layer_parts(decoder: Decoder, acts: dict[str, Array], d: Array, *, by_neuron: bool) -> dict[str, Array]:
    """Heads, heads by source, neurons and biases, one layer at a time: no head's output is ever written out."""
    names = ("attn.z", "attn.head_out", "attn.pattern", "attn.v", "mlp.post", "mlp.gates")
    rows = {name: acts[name] for name in names if name in acts}

    def layer(row: tuple[Block, dict[str, Array]]) -> dict[str, Array]:
        p, acts = row
        acts = {name: in_float32(x) for name, x in acts.items()}
        return _attention_parts(p, acts, d) | _mlp_parts(p, acts, d, by_neuron=by_neuron)

    return jax.lax.map(layer, (decoder.blocks, rows))


def _attention_parts(p: Block, acts: dict[str, Array], d: Array) -> dict[str, Array]:
    """Of one layer."""
    o, o_bias = in_float32(p.attn.o), p.attn.o_bias
    written = None
    if p.attn_post_norm is not None:
        edited = acts.get("attn.head_out")
        written = _plus(jnp.einsum("bpnh,nhd->bpd", acts["attn.z"], o) if edited is None else edited.sum(2), o_bias)
    d, bias, _ = through(p.attn_post_norm, d, d if written is None else written)
    reads = jnp.einsum("bpd,nhd->bpnh", d, o)
    if "attn.head_out" in acts:
        heads = jnp.einsum("bpnd,bpd->bpn", acts["attn.head_out"], d)
    else:
        heads = (acts["attn.z"] * reads).sum(-1)
    parts = {"heads": heads, "attn_bias": bias if o_bias is None else bias + d @ in_float32(o_bias)}
    if "attn.pattern" in acts:
        v = jnp.repeat(acts["attn.v"], o.shape[0] // acts["attn.v"].shape[2], axis=2)
        parts["sources"] = jnp.einsum("bnqk,bknh,bqnh->bqnk", acts["attn.pattern"], v, reads)
    return parts


def _mlp_parts(p: Block, acts: dict[str, Array], d: Array, *, by_neuron: bool) -> dict[str, Array]:
    """Of one layer."""
    if p.mlp is None:
        return {"mlp_bias": jnp.zeros(d.shape[:2], d.dtype)}
    down, down_bias = in_float32(p.mlp.down), p.mlp.down_bias if isinstance(p.mlp, MLP) else None
    neurons, written = acts.get("mlp.post"), d
    if neurons is not None and "mlp.gates" in acts:
        neurons = neurons * acts["mlp.gates"][..., None]
    if neurons is not None and p.mlp_post_norm is not None:
        written = _plus(jnp.einsum("bp...m,...md->bpd", neurons, down), down_bias)
    # without neurons there is no bias for which the scale, which `written` gives, would matter
    d, bias, _ = through(p.mlp_post_norm, d, written)
    parts = {"mlp_bias": bias if down_bias is None else bias + d @ in_float32(down_bias)}
    if by_neuron and neurons is not None:
        parts["neurons"] = neurons * jnp.einsum("bpd,...md->bp...m", d, down)
    return parts


def _plus(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + in_float32(bias)[None, None, :]
