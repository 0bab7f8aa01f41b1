"""Gradients of the metric with respect to what every reader reads, at one point between two runs.

A plain run is differentiated: not the stream's copies, one a reader, but the queries, keys and values that the readers
make of it. From those the gradient of every reader follows by the transposed projection and the norm's derivative, head
by head, so the forward pass costs no more than the model's own.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.scores.rules import PLAIN, Rules
from mi_jax.core.taps import Tap
from mi_jax.data.task import Task
from mi_jax.models.attention import attention
from mi_jax.models.block import Layer, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts

QUERY_KEY_VALUE = ("attn.q", "attn.k", "attn.v")


class Pairs(eqx.Module):
    """Prompt pairs, and how their sources differ.

    Attributes:
      weight: of every pair in the metric.
      embed: the stream of the clean prompts before the first layer.
      difference: what the sources write in the clean run minus their ablation values; 0 at padding.
    """

    task: Task
    weight: Float[Array, " batch"]
    embed: Float[Array, "batch pos d_model"]
    difference: Float[Array, "source batch pos d_model"]

    def by_layer(self, graph: Graph) -> Float[Array, "layer layer_source batch pos d_model"]:
        """The differences of the sources within the layers."""
        return self.difference[1:].reshape(graph.n_layers, graph.layer_sources, *self.difference.shape[1:])


class Point(eqx.Module):
    """Where a gradient is taken: what is added to the clean run before the first layer and after every sublayer."""

    embed: Float[Array, "batch pos d_model"] | None = None
    attn_out: Float[Array, "layer batch pos d_model"] | None = None
    mlp_out: Float[Array, "layer batch pos d_model"] | None = None


class Gradients(eqx.Module):
    """Of the metric at one point.

    Attributes:
      streams: what every layer reads, not a gradient.
      layers: with respect to queries, keys, values and MLP input of every layer (and patterns, where asked for).
      embed, logits: with respect to the first stream and to the last.
    """

    streams: Float[Array, "layer batch pos d_model"]
    layers: dict[str, Float[Array, "layer ..."]]
    embed: Float[Array, "batch pos d_model"]
    logits: Float[Array, "batch pos d_model"]


class _Probe:
    """A tap that adds to sites, applies rules to the gradient, and keeps what it is asked for."""

    def __init__(
        self,
        add: dict[str, Array],
        gates: dict[str, Array],
        rules: Rules,
        layer: Layer,
        config: Any,
    ):
        self._add, self._gates = add, gates
        self._rules = rules.of(layer, config)

    def touches(self, name: str) -> bool:
        return self._rules.touches(name)

    def __call__(self, name: str, x: Array) -> Array:
        if name in self._gates:
            x = jnp.where(self._gates[name], x, jax.lax.stop_gradient(x))
        return self._rules(name, x + self._add[name] if name in self._add else x)


def _zeros(model: Decoder, shape: tuple[int, ...], dtype: Any, pattern: bool) -> dict[str, Array]:
    config, (batch, pos, d_model) = model.config, shape
    heads = {
        "attn.q": config.n_heads,
        "attn.k": config.n_kv_heads,
        "attn.v": config.n_kv_heads,
    }
    shapes: dict[str, tuple[int, ...]] = {name: (batch, pos, n, config.d_head) for name, n in heads.items()}
    if config.d_mlp:
        shapes["mlp.in"] = (batch, pos, d_model)
    if pattern:
        shapes["attn.pattern"] = (batch, config.n_heads, pos, pos)
    return {name: jnp.zeros((config.n_layers, *s), dtype) for name, s in shapes.items()}


def gradients(
    model: Decoder,
    pairs: Pairs,
    point: Point,
    *,
    rules: Rules = PLAIN,
    gates: Mapping[str, Bool[Array, " layer"]] | None = None,
    pattern: bool = False,
) -> Gradients:
    """The gradients at a point.

    Args:
      rules: how the backward pass departs from the derivative.
      gates: of "attn_out" and "mlp_out": False stops the gradient through what that layer's sublayer adds.
      pattern: also with respect to the attention patterns.
    """
    config, task = model.config, pairs.task
    numbers = jnp.arange(config.n_layers, dtype=jnp.int32)
    shifts = {"attn_out": point.attn_out, "mlp_out": point.mlp_out}
    shifts = {name: shift for name, shift in shifts.items() if shift is not None}
    outside = Tap(model.site_table, {}, (), {}, None)

    def metric(added, embed, last):
        def body(x, row):
            number, params, added, shifts, gates = row
            layer = model.layer(number, params)
            tap = _Probe(added | shifts, gates, rules, layer, config)
            return block(layer, x, tap, config, Prompts(task.mask)), x

        x, streams = jax.lax.scan(
            body,
            pairs.embed + embed,
            (numbers, model.blocks, added, shifts, dict(gates or {})),
        )
        values = task.metric(model.head(x + last, outside, task.position))
        return (pairs.weight.astype(values.dtype) * values).sum(), streams

    zeros = _zeros(model, pairs.embed.shape, pairs.embed.dtype, pattern)
    embed = jnp.zeros_like(pairs.embed) if point.embed is None else point.embed
    grad = jax.grad(metric, argnums=(0, 1, 2), has_aux=True)
    (layers, first, last), streams = grad(zeros, embed, jnp.zeros_like(embed))
    return Gradients(streams, layers, first, last)


class _Projection:
    """A tap that gives every reader its own input, and keeps what it makes of it."""

    def __init__(self, inputs: dict[str, Array]):
        self._inputs = inputs
        self.made: dict[str, Array] = {}

    def touches(self, name: str) -> bool:
        return name in self._inputs

    def __call__(self, name: str, x: Array) -> Array:
        if name in self._inputs:
            return self._inputs[name]
        if name in QUERY_KEY_VALUE:
            self.made[name] = x
        return x


def projections(
    model: Decoder,
    layer: Layer,
    h: Float[Array, "batch pos d_model"],
    mask: Bool[Array, "batch pos"],
) -> Any:
    """The function from the normalized inputs of a layer's queries, keys and values, by site, to these."""

    def made(inputs: dict[str, Array]) -> dict[str, Array]:
        tap = _Projection(inputs)
        attention(
            layer.params.attn,
            None,
            h,
            tap,
            model.config,
            Prompts(mask),
            layer.turn,
            layer.window,
        )
        return tap.made

    return made


def point_of_input(pairs: Pairs, alpha: Float[Array, ""]) -> Point:
    """The embedding on the line from the ablation value (alpha = 0) to the clean one (alpha = 1)."""
    return Point(embed=(alpha - 1).astype(pairs.embed.dtype) * pairs.difference[0])


def layer_numbers(graph: Graph) -> Int[Array, " source"]:
    """The layer of every source after the input."""
    return jnp.repeat(jnp.arange(graph.n_layers, dtype=jnp.int32), graph.layer_sources)
