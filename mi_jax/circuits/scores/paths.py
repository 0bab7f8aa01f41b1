"""Scores from gradients averaged along a path: `score(s→r) = (z_s − z'_s) · mean ∂m/∂v_r`.

z is the clean run, z' the ablation values, v_r what reader r reads. The methods differ in where the gradient is taken.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.gradients import (
    Pairs,
    Point,
    gradients,
    point_of_input,
)
from mi_jax.circuits.scores.readers import added, nothing, scores_of
from mi_jax.circuits.scores.rules import RELP
from mi_jax.core.precision import widened, widened_dtype
from mi_jax.models.decoder import Decoder

Scores = Float[Array, "source reader *pos"]


def _output(positions: bool) -> str:
    return "srp" if positions else "sr"


def _averaged(
    model: Decoder,
    pairs: Pairs,
    place: Callable[[Any], tuple[Point, dict[str, Array]]],
    points: Any,
    positions: bool,
) -> Scores:
    """Scores from the mean of the readers' gradients over points, one after the other."""
    start = nothing(model, pairs)
    n = jax.tree.leaves(points)[0].shape[0]

    def add(total, at):
        point, gates = place(at)
        return added(model, pairs, gradients(model, pairs, point, gates=gates), total), None

    total, _ = jax.lax.scan(add, start, points)
    return scores_of(model, pairs, total, _output(positions)) / n


def _along_input(model: Decoder, pairs: Pairs, alphas: list[float], positions: bool) -> Scores:
    at = jnp.asarray(alphas, widened_dtype(pairs.embed.dtype))
    return _averaged(model, pairs, lambda alpha: (point_of_input(pairs, alpha), {}), at, positions)


def eap(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """The gradient on the clean run (Syed et al. 2023)."""
    return scores_of(
        model,
        pairs,
        added(model, pairs, gradients(model, pairs, Point())),
        _output(positions),
    )


def eap_ig_inputs(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """Embeddings from the corrupt to the clean one, `k / steps` for k from 0, the clean end left out (Hanna 2024)."""
    return _along_input(model, pairs, [k / steps for k in range(steps)], positions)


def clean_corrupted(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """The mean of the gradients with the clean and with the corrupt embedding."""
    return _along_input(model, pairs, [1.0, 0.0], positions)


def relevance(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """The clean run with the backward pass of relevance patching; see `rules`."""
    model = RELP.prepared(model)
    found = gradients(model, pairs, Point(), rules=RELP)
    return scores_of(model, pairs, added(model, pairs, found), _output(positions))


def eap_ig_activations(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """What the EAP-IG package computes under this name.

    One layer-wise node at a time (the input, all heads of a layer together, an MLP) is replaced by a value on the line
    from its ablation value to its clean one, at `k / steps` for k from 1, and no gradient flows back through it. Every
    edge gets the mean over the points of all nodes, whether or not the node is the edge's source; `ig_activations` is
    the integral of every source of its own.
    """
    graph = Graph.of(model.config)
    n_nodes = 1 + graph.n_layers * (1 + graph.has_mlp)
    by_layer = pairs.by_layer(graph)
    attended, mlp = (
        by_layer[:, : graph.n_heads].sum(1),
        by_layer[:, graph.n_heads :].sum(1),
    )
    layers = jnp.arange(graph.n_layers, dtype=jnp.int32)

    def place(at):
        node, alpha = at
        shift = (alpha - 1).astype(pairs.embed.dtype)
        heads, mlps = (node == first + layers for first in (1, 1 + graph.n_layers))
        attn_out = jnp.where(heads[:, None, None, None], shift * attended, 0)
        mlp_out = jnp.where(mlps[:, None, None, None], shift * mlp, 0) if graph.has_mlp else None
        point = Point(jnp.where(node == 0, shift * pairs.difference[0], 0), attn_out, mlp_out)
        return point, {"attn_out": ~heads, "mlp_out": ~mlps}

    nodes = jnp.repeat(jnp.arange(n_nodes, dtype=jnp.int32), steps)
    alphas = jnp.tile(jnp.arange(1, steps + 1, dtype=widened_dtype(pairs.embed.dtype)) / steps, n_nodes)
    return _averaged(model, pairs, place, (nodes, alphas), positions)


def eap_gp(model: Decoder, pairs: Pairs, *, steps: int, positions: bool) -> Scores:
    """Gradients along a path that avoids flat regions (after Zhang et al. 2025, EAP-GP).

    The path starts at the clean embedding x_0 and follows the difference of gradients,

        x_{j+1} = x_j + ‖x' − x_0‖ / steps · d_j / ‖d_j‖,   d_j = ±(∇m(x') − ∇m(x_j)),

    of every pair on its own, the sign being that which leads towards the corrupt embedding x'. The score is the mean
    over x_0 … x_{steps−1}. Where the gradients are equal, the step goes straight to x'.
    """
    # steps are small beside what they add up to
    whole, narrow = widened(-pairs.difference[0]), pairs.embed.dtype
    length = _norms(whole) / steps
    end = widened(gradients(model, pairs, Point(embed=whole.astype(narrow))).embed)

    def follow(carry, _):
        shift, total = carry
        here = gradients(model, pairs, Point(embed=shift.astype(narrow)))
        left = whole - shift
        direction = end - widened(here.embed)
        ahead = (direction * left).sum((1, 2), keepdims=True)
        direction = jnp.where(ahead < 0, -direction, direction)
        direction = jnp.where(_norms(direction) > 0, direction, left)
        size = _norms(direction)
        step = length * direction / jnp.where(size > 0, size, jnp.ones_like(size))
        return (shift + step, added(model, pairs, here, total)), None

    start = jnp.zeros_like(whole), nothing(model, pairs)
    (_, total), _ = jax.lax.scan(follow, start, length=steps)
    return scores_of(model, pairs, total, _output(positions)) / steps


def _norms(x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch 1 1"]:
    """Of every prompt."""
    return jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True))
