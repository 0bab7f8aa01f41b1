"""AtP* for edges (Kramár et al. 2024): the QK fix and GradDrop of `mi_jax.core.atp`, with an edge in a node's place.

The edge from s to a query or key gives its reader `v_r − (z_s − z'_s)`; norm, projection and softmax are computed with
that, one query or one key position at a time, and only from the pattern on is the metric linear in the change. Edges
to values, MLPs and the logits are scored as by `eap`. GradDrop then averages absolute scores, of every pair, over
gradients in which what one layer adds to the stream is a constant.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.gradients import (
    Gradients,
    Pairs,
    Point,
    gradients,
    projections,
)
from mi_jax.circuits.scores.readers import added, scores_of
from mi_jax.core.atp import key_effects, query_effects
from mi_jax.core.errors import InputError
from mi_jax.core.precision import widened
from mi_jax.core.taps import Tap
from mi_jax.models.attention import attention
from mi_jax.models.block import Layer
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import normed
from mi_jax.models.sites import attention_rule

PairScores = Float[Array, "batch source reader pos"]


def qk_fixed(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Float[Array, "source reader *pos"]:
    """`eap` with the QK fix."""
    found = gradients(model, pairs, Point(), pattern=True)
    scores = _scores(model, pairs, jax.tree.map(lambda g: g[None], found))[0].sum(0)
    return scores if positions else scores.sum(-1)


def grad_dropped(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Float[Array, "source reader *pos"]:
    """The QK fix and GradDrop; no score is negative.

    Raises:
      InputError: a model of one layer, of which nothing is left when a layer is dropped.
    """
    n_layers = model.config.n_layers
    if n_layers < 2:
        raise InputError(f"method 'atp*' drops one layer at a time and {model.config.name} has one: use 'atp+qk'")
    layers = jnp.arange(n_layers, dtype=jnp.int32)

    def without(layer):
        kept = layers != layer
        return gradients(
            model,
            pairs,
            Point(),
            gates={"attn_out": kept, "mlp_out": kept},
            pattern=True,
        )

    scores = _scores(model, pairs, jax.lax.map(without, layers))
    # an edge acts at all positions together
    whole = scores if positions else scores.sum(-1)
    return jnp.abs(whole).sum((0, 1)) / (n_layers - 1)


def _scores(model: Decoder, pairs: Pairs, found: Gradients) -> Float[Array, "drop batch source reader pos"]:
    """Scores for several backward passes of the clean run, the leading axis of the gradients."""
    graph = Graph.of(model.config)
    linear = jax.lax.map(lambda one: scores_of(model, pairs, added(model, pairs, one), "bsrp"), found)
    fixed = _query_key(model, pairs, found)
    n_qk = graph.n_heads + graph.n_kv_heads
    layers = linear[..., :-1, :].reshape(*linear.shape[:3], graph.n_layers, graph.layer_readers, linear.shape[-1])
    layers = jnp.concatenate([fixed.astype(linear.dtype), layers[..., n_qk:, :]], -2)
    return jnp.concatenate(
        [layers.reshape(*linear.shape[:3], -1, linear.shape[-1]), linear[..., -1:, :]],
        -2,
    )


def _query_key(
    model: Decoder, pairs: Pairs, found: Gradients
) -> Float[Array, "drop batch source layer query_key_reader pos"]:
    """Scores of edges to queries and keys."""
    rule = attention_rule(model.config)
    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)

    def layer(row):
        number, params, x, pattern = row
        here = model.layer(number, params)
        reads = _reads(model, here, pairs)
        clean, scores = jax.tree.map(widened, reads(x)), _attention_scores(model, here, x, pairs.task.mask)

        def source(difference):
            new = jax.tree.map(widened, reads(x - difference))

            def effects(gradient):
                query = query_effects(new["attn.q"], clean["attn.k"], scores, gradient, rule)
                key = key_effects(clean["attn.q"], new["attn.k"], scores, gradient, rule)
                return -jnp.moveaxis(jnp.concatenate([query, key], -1), -1, -2)

            return jax.vmap(effects)(widened(pattern))

        return jax.lax.map(source, pairs.difference)

    patterns = jnp.moveaxis(found.layers["attn.pattern"], 0, 1)
    # [layer source drop batch reader pos]
    out = jax.lax.map(layer, (numbers, model.blocks, found.streams[0], patterns))
    return jnp.transpose(out, (2, 3, 1, 0, 4, 5))


def _reads(
    model: Decoder, layer: Layer, pairs: Pairs
) -> Callable[[Float[Array, "batch pos d_model"]], dict[str, Array]]:
    """Queries and keys, as a function of the stream that they read."""

    def reads(x):
        h = normed(layer.params.attn_norm, x)
        return projections(model, layer, h, pairs.task.mask)({})

    return reads


def _attention_scores(
    model: Decoder,
    layer: Layer,
    x: Float[Array, "batch pos d_model"],
    mask: Bool[Array, "batch pos"],
) -> Float[Array, "batch head query key"]:
    """Before the softmax, what the mask forbids included, as the least number of the wider dtype."""
    tap = Tap(model.site_table, {}, ("attn.scores",), {}, None)
    p = layer.params
    attention(
        p.attn,
        p.attn_norm,
        x,
        tap,
        model.config,
        Prompts(mask),
        layer.turn,
        layer.window,
    )
    scores = tap.seen["attn.scores"]
    exact = widened(scores)
    return jnp.where(scores == jnp.finfo(scores.dtype).min, jnp.finfo(exact.dtype).min, exact)
