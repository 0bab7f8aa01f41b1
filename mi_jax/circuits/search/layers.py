"""One layer of a circuit whose readers are fed one by one, in two steps: its attention, then what follows from that.

The last layer computes only what the answer needs: its queries and its MLP at the position of the answer alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.answer import AnswerLayout, at_answer
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import weighted
from mi_jax.circuits.sources import SourceTap
from mi_jax.data.task import Task
from mi_jax.models.attention import attention, projected
from mi_jax.models.block import Layer, block
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Layout, Prompts
from mi_jax.models.norm import Norm


class Feed(NamedTuple):
    """What the readers of a layer read beside the stream."""

    queries: Float[Array, "head batch query d_model"]
    keys_values: Float[Array, "reader batch pos d_model"]
    mlp: Float[Array, "mlp batch query d_model"]


class Wrote(NamedTuple):
    """What a layer did.

    Attributes:
      z: of the heads, before they are projected to the stream.
      heads, mlp: what a corrupted edge carries minus what each source of the layer writes.
      mlp_out: what the MLP adds to the stream.
    """

    z: Float[Array, "batch query head d_head"]
    heads: Float[Array, "source batch query d_model"]
    mlp: Float[Array, "source batch query d_model"]
    mlp_out: Float[Array, "batch query d_model"]


class Place(NamedTuple):
    """A layer among the others."""

    number: int | Array
    layer: Layer
    layout: Layout
    is_last: bool


def place_of(model: Decoder, task: Task, number: int | Array, *, is_last: bool) -> Place:
    """The layer of this number."""
    params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), model.blocks)
    layout = AnswerLayout(task.mask, task.position) if is_last else Prompts(task.mask)
    return Place(number, model.layer(number, params), layout, is_last)


def feed(graph: Graph, task: Task, weights: Float[Array, "source reader"], values: Array, *, is_last: bool) -> Feed:
    """The weighted sums over some sources, for the readers of one layer."""
    h, end = graph.n_heads, graph.n_heads + 2 * graph.n_kv_heads
    if is_last:
        here = at_answer(values, task.position, 2)
        asking = summed(jnp.concatenate([weights[:, :h], weights[:, end:]], 1), here)
        return Feed(asking[:h], summed(weights[:, h:end], values), asking[h:])
    everything = summed(weights, values)
    return Feed(everything[:h], everything[h:end], everything[end:])


def summed(weights: Float[Array, "source reader"], values: Array) -> Float[Array, "reader batch pos d_model"]:
    """The weighted sums as arrays of their own: merged into what reads them, they are much slower on a CPU."""
    return jax.lax.optimization_barrier(weighted(weights, values))


def heads_of(
    config: DecoderConfig, place: Place, x: Float[Array, "batch pos d_model"], fed: Feed
) -> Float[Array, "batch query head d_head"]:
    """What the heads of a layer gather, before it is projected to the stream."""
    tap = _HeadsTap(fed)
    params = place.layer.params
    attention(params.attn, params.attn_norm, x, tap, config, place.layout, place.layer.turn, place.layer.window)
    return tap.z


class Groups(NamedTuple):
    """Heads that a query, key or value can change together: one key/value head and those that share it."""

    n: int
    heads: int
    kv_heads: int


def groups_of(config: DecoderConfig) -> Groups:
    """How the heads of a layer fall into groups."""
    # a norm over all heads together makes every head depend on all
    n = 1 if config.qk_norm == "whole" else config.n_kv_heads
    return Groups(n, config.n_heads // n, config.n_kv_heads // n)


def members(graph: Graph, groups: Groups, number: Int[Array, ""]) -> tuple[Int[Array, " head"], Int[Array, " kv_head"]]:
    """The heads of a group, and its key/value heads."""
    heads, kv_heads = (jnp.arange(n, dtype=jnp.int32) for n in (groups.heads, groups.kv_heads))
    return number * groups.heads + heads, number * groups.kv_heads + kv_heads


def depend_on_each_other(config: DecoderConfig) -> bool:
    """Whether what a head writes depends on the others of its layer: by a norm of their sum, or of all queries."""
    return config.norms in ("output", "sandwich") or groups_of(config).n == 1


def one_group(config: DecoderConfig, place: Place, number: Int[Array, ""]) -> tuple[DecoderConfig, Place]:
    """The layer as if it had only the heads of one group."""
    groups = groups_of(config)
    if groups.n == 1:
        return config, place
    attn = place.layer.params.attn
    begins = {"q": groups.heads, "o": groups.heads, "k": groups.kv_heads, "v": groups.kv_heads}
    found = {}
    for letter, size in begins.items():
        axis = 0 if letter == "o" else 1
        found[letter] = jax.lax.dynamic_slice_in_dim(getattr(attn, letter), number * size, size, axis)
        bias = getattr(attn, f"{letter}_bias")
        if letter != "o" and bias is not None:
            found[f"{letter}_bias"] = jax.lax.dynamic_slice_in_dim(bias, number * size, size, 0)
    params = dataclasses.replace(place.layer.params, attn=dataclasses.replace(attn, **found))
    smaller = dataclasses.replace(config, n_heads=groups.heads, n_kv_heads=groups.kv_heads)
    return smaller, place._replace(layer=dataclasses.replace(place.layer, params=params))


class Heads(NamedTuple):
    """The heads whose outputs are of interest: what a layer reads of them beside its feed.

    Attributes:
      moving: their numbers, or None for all.
      to_mlp: weights of their edges to the MLP of the layer.
      patch: what a corrupted edge of theirs carries, then those of the MLP's sources.
    """

    moving: Int[Array, " head"] | None
    to_mlp: Float[Array, " head"]
    patch: Float[Array, "source batch query d_model"]
    mlp_patch: Float[Array, "source batch query d_model"]


def after_heads(
    model: Decoder,
    place: Place,
    x: Float[Array, "batch pos d_model"],
    z: Float[Array, "batch query head d_head"],
    into_mlp: Float[Array, "mlp batch query d_model"],
    heads: Heads,
    known: Wrote | None = None,
    mlp_changes: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, "batch query d_model"], Wrote]:
    """The stream after a layer whose heads gathered z, and what its sources write.

    Args:
      known: what the MLP gives where `mlp_changes` is false; None computes it.
    """
    graph = Graph.of(model.config)

    def run(known_mlp: Wrote | None):
        tap = _RestTap(graph, place.layer, z, into_mlp, heads, known_mlp)
        after = block(place.layer, x, tap, model.config, place.layout)
        return after, Wrote(z, tap.heads, tap.mlp, tap.mlp_out)

    if known is None or not graph.has_mlp:
        return run(None)
    return jax.lax.cond(mlp_changes, lambda: run(None), lambda: run(known))


class _HeadsTap:
    """Feeds the queries, keys and values, and keeps what the heads gather."""

    def __init__(self, fed: Feed):
        kv = len(fed.keys_values) // 2
        keys, values = fed.keys_values[:kv], fed.keys_values[kv:]
        self._fed = {"attn.q_in": fed.queries, "attn.k_in": keys, "attn.v_in": values}
        self.z: Array

    def touches(self, name: str) -> bool:
        return name in self._fed

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """The readers of that name, each of its own stream."""
        return projected(x[None] + self._fed[name], norm, w)

    def __call__(self, name: str, x: Array) -> Array:
        if name == "attn.z":
            self.z = x
        return x


class _RestTap(SourceTap):
    """Puts the heads' z in, feeds the MLP, and records what the sources write."""

    def __init__(self, graph: Graph, layer: Layer, z: Array, into_mlp: Array, heads: Heads, known: Wrote | None):
        super().__init__(graph, layer.params)
        self._z, self._into_mlp, self._given, self._known = z, into_mlp, heads, known
        self.heads: Array
        shape = (0, *heads.patch.shape[1:])
        self.mlp = jnp.zeros(shape, z.dtype) if known is None else known.mlp
        self.mlp_out = jnp.zeros(shape[1:], z.dtype) if known is None else known.mlp_out

    def touches(self, name: str) -> bool:
        return self._known is None and super().touches(name)

    def __call__(self, name: str, x: Array) -> Array:
        if name == "attn.z":
            moving = self._given.moving
            if moving is None:
                super().__call__(name, self._z)
                written = self.written[0]
            else:
                written = jnp.einsum("bpnh,nhd->nbpd", self._z[:, :, moving], self._params.attn.o[moving])
            self.heads = self._given.patch - written
            return self._z
        if name == "mlp.in":
            x = x + self._into_mlp[0]
            return x if self._graph.parallel else x + weighted(self._given.to_mlp[:, None], self.heads)[0]
        if name == "mlp_out":
            if self._known is not None:
                return self._known.mlp_out
            self.mlp_out = x
        if self._known is None and name in ("mlp.gates", "mlp.expert_out", "mlp_out"):
            before = len(self.written)
            super().__call__(name, x)
            if len(self.written) > before:
                self.mlp = self._given.mlp_patch - self.written[-1]
        return x
