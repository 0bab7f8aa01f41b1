"""The integral of every source along its own path: one run for every source and step.

`score(s→r) = (z_s − z'_s) · ∫ ∂m/∂v_r dα`, with only z_s on the line `z'_s + α (z_s − z'_s)` and everything after it
computed. Over the readers of a source, the scores add up to what corrupting the whole source changes, as the number of
steps grows. In a mixture they do not: where the path changes which experts a router chooses, the metric jumps, and no
gradient has seen it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.gradients import (
    QUERY_KEY_VALUE,
    Gradients,
    Pairs,
    Point,
    gradients,
    layer_numbers,
    projections,
)
from mi_jax.circuits.scores.readers import Readers, joined
from mi_jax.core.precision import widened_dtype
from mi_jax.models.decoder import Decoder
from mi_jax.models.norm import normed


def ig_activations(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Float[Array, "source reader *pos"]:
    """The integral by the midpoint rule: α at `(k + 1/2) / steps`."""
    graph = Graph.of(model.config)
    layers = jnp.arange(graph.n_layers, dtype=jnp.int32)[:, None, None, None]
    alphas = (jnp.arange(steps, dtype=widened_dtype(pairs.embed.dtype)) + 0.5) / steps
    within = layer_numbers(graph)
    # 0 the input, 1 a head, 2 an MLP or an expert
    kinds = jnp.asarray([1] * graph.n_heads + [2] * (graph.layer_sources - graph.n_heads), jnp.int32)
    kinds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.tile(kinds, graph.n_layers)])
    within = jnp.concatenate([jnp.zeros(1, jnp.int32), within])

    def source(row):
        difference, kind, layer = row

        def at(total, alpha):
            shift = (alpha - 1).astype(difference.dtype) * difference
            in_layer = jnp.where(layers == layer, shift[None], 0)
            point = Point(
                jnp.where(kind == 0, shift, 0),
                jnp.where(kind == 1, in_layer, 0),
                jnp.where(kind == 2, in_layer, 0) if graph.has_mlp else None,
            )
            return total + _along(model, pairs, gradients(model, pairs, point), difference), None

        start = jnp.zeros((graph.n_readers, pairs.embed.shape[1]), widened_dtype(difference.dtype))
        return jax.lax.scan(at, start, alphas)[0] / steps

    scores = jax.lax.map(source, (pairs.difference, kinds, within))
    return scores if positions else scores.sum(-1)


def _along(
    model: Decoder,
    pairs: Pairs,
    found: Gradients,
    difference: Float[Array, "batch pos d_model"],
) -> Float[Array, "reader pos"]:
    """The derivative in one direction through every reader, without the gradients of the readers' inputs."""
    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)
    exact = widened_dtype(difference.dtype)

    def body(_, row):
        number, params, x, made = row
        layer = model.layer(number, params)

        def reads(x):
            h = normed(layer.params.attn_norm, x)
            return projections(model, layer, h, pairs.task.mask)({})

        _, moved = jax.jvp(reads, (x,), (difference,))
        parts = [(moved[name].astype(exact) * made[name].astype(exact)).sum((0, 3)) for name in QUERY_KEY_VALUE]
        return None, jnp.concatenate([part.T for part in parts])

    made = {name: found.layers[name] for name in QUERY_KEY_VALUE}
    _, attended = jax.lax.scan(body, None, (numbers, model.blocks, found.streams, made))

    def through(gradient):
        return (difference.astype(exact) * gradient.astype(exact)).sum((-3, -1))

    mlp = jax.vmap(through)(found.layers["mlp.in"]) if "mlp.in" in found.layers else None
    return joined(Readers(attended, mlp, through(found.logits)), 0)
