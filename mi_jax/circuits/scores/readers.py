"""From gradients of queries, keys and values to scores of the edges into their readers.

The input of a reader goes through the norm, `h = s · (x − mean) · w + b` with the scale s, and a projection W. Write
`x̂ = s · (x − mean)`, `U` for `w · W` with its mean over d_model taken away (where the norm centres), and g for the
gradient of what the projection gives. Then the gradient of the reader's input is

    s · U g − x̂ · c,    c = s / d_model · (x̂ · U g).

Over the points of a path only `s · g` (as wide as a head, not as the stream) and the numbers `c · (x̂ · difference)` are
added up; U comes last, once. So the gradients of all readers at all points are never there.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.gradients import (
    QUERY_KEY_VALUE,
    Gradients,
    Pairs,
    projections,
)
from mi_jax.circuits.scores.rules import FrozenNorm
from mi_jax.core.precision import widened, widened_dtype
from mi_jax.models.block import Layer
from mi_jax.models.decoder import Decoder
from mi_jax.models.norm import Norm, normed

_INPUTS = {"attn.q": "attn.q_in", "attn.k": "attn.k_in", "attn.v": "attn.v_in"}


class Readers(eqx.Module):
    """Something of every reader: queries, keys and values of a layer, its MLP, and the logits."""

    attention: Float[Array, "..."]
    mlp: Float[Array, "..."] | None
    logits: Float[Array, "..."]


class Total(eqx.Module):
    """What the gradients at some points add up to.

    Attributes:
      heads: `s · g` of queries, keys and values.
      along: `c · (x̂ · difference)`.
      mlp, logits: gradients of the inputs of these readers.
    """

    heads: Float[Array, "layer batch pos attention_reader d_head"]
    along: Float[Array, "layer batch pos attention_reader source"]
    mlp: Float[Array, "layer batch pos d_model"] | None
    logits: Float[Array, "batch pos d_model"]


def nothing(model: Decoder, pairs: Pairs) -> Total:
    """Of no points."""
    graph = Graph.of(model.config)
    (batch, pos, d_model), dtype = pairs.embed.shape, widened_dtype(pairs.embed.dtype)
    heads = (graph.n_layers, batch, pos, graph.n_heads + 2 * graph.n_kv_heads)
    return Total(
        jnp.zeros((*heads, model.config.d_head), dtype),
        jnp.zeros((*heads, graph.n_sources), dtype),
        jnp.zeros((graph.n_layers, batch, pos, d_model), dtype) if graph.has_mlp else None,
        jnp.zeros((batch, pos, d_model), dtype),
    )


def added(model: Decoder, pairs: Pairs, found: Gradients, total: Total | None = None) -> Total:
    """One more point."""
    total = nothing(model, pairs) if total is None else total
    difference = jnp.transpose(widened(pairs.difference), (1, 2, 0, 3))
    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)

    def body(_, row):
        number, params, x, made, heads, along = row
        layer = model.layer(number, params)
        projected = _of_projections(model, layer, x, pairs.task.mask, made)
        scale, unit = _scale(layer.params.attn_norm, x)
        heads = heads + scale[..., None] * projected
        if unit is None:
            return None, (heads, along)
        weights = _weights(layer.params.attn_norm, layer)
        onto = (jnp.einsum("bpd,dnh->bpnh", unit, weights) * projected).sum(-1) * scale / unit.shape[-1]
        moved = jnp.einsum("bpsd,bpd->bps", difference, unit)
        return None, (heads, along + onto[..., None] * moved[:, :, None, :])

    made = {name: found.layers[name] for name in QUERY_KEY_VALUE}
    xs = (numbers, model.blocks, found.streams, made, total.heads, total.along)
    _, (heads, along) = jax.lax.scan(body, None, xs)
    mlp = None if total.mlp is None else total.mlp + widened(found.layers["mlp.in"])
    return Total(heads, along, mlp, total.logits + widened(found.logits))


def scores_of(model: Decoder, pairs: Pairs, total: Total, output: str) -> Float[Array, "..."]:
    """`Σ difference · gradient`, over the axes that `output` leaves out of "bsrp" (batch, source, reader, pos)."""
    difference = widened(pairs.difference)
    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)

    def product(axes: str, gradient: Array) -> Array:
        to = output.replace("r", axes.removesuffix("bpd"))
        return jnp.einsum(
            f"sbpd,{axes}->{to}",
            difference,
            gradient,
            precision=jax.lax.Precision.HIGHEST,
        )

    def projected(row):
        number, params, heads = row
        weights = _weights(params.attn_norm, model.layer(number, params))
        return jnp.einsum("bpnh,dnh->nbpd", heads, weights)

    attended = product("lrbpd", jax.lax.map(projected, (numbers, model.blocks, total.heads)))
    attended = attended - jnp.einsum(f"lbprs->{output.replace('r', 'lr')}", total.along)
    mlp = None if total.mlp is None else product("lbpd", total.mlp)
    return joined(Readers(attended, mlp, product("bpd", total.logits)), output.index("r"))


def joined(readers: Readers, axis: int) -> Float[Array, "..."]:
    """One axis of readers in the order of the graph.

    Args:
      axis: where the axis of readers stands in the result; the parts have `layer` there and then, for attention, the
        reader.
    """
    parts = readers.attention
    if readers.mlp is not None:
        parts = jnp.concatenate([parts, jnp.expand_dims(readers.mlp, axis + 1)], axis + 1)
    flat = parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])
    return jnp.concatenate([flat, jnp.expand_dims(readers.logits, axis)], axis)


def _of_projections(
    model: Decoder,
    layer: Layer,
    x: Float[Array, "batch pos d_model"],
    mask: Bool[Array, "batch pos"],
    made: dict[str, Float[Array, "batch pos n d_head"]],
) -> Float[Array, "batch pos attention_reader d_head"]:
    """Gradients of what the projections give, before norms of heads and rotary positions.

    The model's own attention does the rest, with projections that are the identity.
    """
    attn, h = layer.params.attn, normed(layer.params.attn_norm, x)
    rows, plain = {}, {}
    for letter in "qkv":
        w, bias = getattr(attn, letter), getattr(attn, f"{letter}_bias")
        rows[f"attn.{letter}_in"] = jnp.einsum("bpd,dnh->bpnh", h, w) + (0 if bias is None else bias[None, None])
        eye = jnp.eye(w.shape[2], dtype=w.dtype)
        plain |= {
            letter: jnp.broadcast_to(eye[:, None], (w.shape[2], *w.shape[1:])),
            f"{letter}_bias": None,
        }
    plain |= {
        "o": jnp.zeros((*attn.q.shape[1:], attn.q.shape[2]), attn.o.dtype),
        "o_bias": None,
    }
    bare = dataclasses.replace(layer.params, attn=dataclasses.replace(attn, **plain))
    read = projections(model, Layer(bare, layer.turn, layer.window), rows["attn.q_in"][:, :, 0], mask)
    _, pull = jax.vjp(read, rows)
    (gradients,) = pull(made)
    return widened(jnp.concatenate([gradients[_INPUTS[name]] for name in QUERY_KEY_VALUE], 2))


def _scale(norm: Norm | None, x: Float[Array, "batch pos d_model"]) -> tuple[Array, Array | None]:
    """s, and x̂ where the gradient goes through s."""
    exact = widened(x)
    if norm is None or norm.weight is None:
        return jnp.ones((*x.shape[:2], 1), exact.dtype), None
    if norm.bias is not None:
        exact = exact - exact.mean(-1, keepdims=True)
    scale = norm.scale(exact)
    return scale, None if isinstance(norm, FrozenNorm) else exact * scale


def _weights(norm: Norm | None, layer: Layer) -> Float[Array, "d_model attention_reader d_head"]:
    """U of queries, keys and values."""
    attn = layer.params.attn
    weights = widened(jnp.concatenate([attn.q, attn.k, attn.v], 1))
    if norm is None or norm.weight is None:
        return weights
    weights = weights * (widened(norm.weight) + norm.offset)[:, None, None]
    return weights if norm.bias is None else weights - weights.mean(0, keepdims=True)
