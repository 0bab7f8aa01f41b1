"""One layer of a masked run: every reader is fed its own stream, and what the sources write is kept.

A reader reads the ablated stream, what all sources would write if every edge were cut, and on top of it what the edges
that are kept bring: `base + Σ_s kept[s, r] · (z[s] − patch[s])`. These sums are taken in float32 or better.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.answer import AnswerLayout, at_answer
from mi_jax.circuits.runs.sources import SourceTap, unsourced
from mi_jax.models.attention import projected
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Layout
from mi_jax.models.norm import Norm, widened


def masked_layer(
    model: Decoder,
    number: Int[Array, ""] | int,
    base: Float[Array, "batch pos d_model"],
    terms: Sequence[tuple[Array, Array]],
    to_mlp: Float[Array, "1 head *pos"],
    patch: Float[Array, "source batch pos d_model"] | None,
    layout: Layout,
    *,
    computed: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, "batch query d_model"], Float[Array, "source batch query d_model"]]:
    """The ablated stream after a layer, at the tokens that ask, and by how much its sources differ from the patch.

    Args:
      base: the ablated stream before the layer.
      terms: of some sources before the layer each, the weights of their edges into its readers `[reader some *pos]`,
        and by how much they differ from the patch `[some batch pos d_model]`.
      to_mlp: weights of the edges from the layer's heads to its MLP.
      patch: what the layer's sources write where they are ablated; None for what they write in this very run for the
        example before.
      computed: False where they write that in this run too, and the layer need not be run.
    """
    graph = Graph.of(model.config)
    # looked up in the whole: a chunk of the weights would be copied first
    params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), model.blocks)
    asked = None if patch is None else widened(asking(patch, layout))

    def run() -> tuple[Array, Array]:
        tap = _EdgeTap(graph, params, base, _reads(graph, terms, layout), to_mlp, asked, layout)
        # of the block's own stream nothing is used, so it is not compiled
        block(model.layer(number, params), base.astype(params.attn.q.dtype), tap, model.config, layout)
        return tap.base_after(), jnp.concatenate(tap.written)

    def skip() -> tuple[Array, Array]:
        assert asked is not None
        rest = sum(unsourced(graph, params))
        return layout.asking(base) + asked.sum(0) + rest, jnp.zeros_like(asked)

    return run() if computed is None or asked is None else jax.lax.cond(computed, run, skip)


def weighted(
    weights: Float[Array, "reader source *pos"], values: Float[Array, "source batch pos d_model"]
) -> Float[Array, "reader batch pos d_model"]:
    """For every reader the weighted sum over the sources."""
    return jnp.einsum("rsp,sbpd->rbpd" if weights.ndim == 3 else "rs,sbpd->rbpd", weights, values)


def weighted_at(
    weights: Float[Array, "reader source *pos"], values: Float[Array, "source batch query d_model"], layout: Layout
) -> Float[Array, "reader batch query d_model"]:
    """`weighted`, of values at the positions that ask."""
    if weights.ndim == 3 and isinstance(layout, AnswerLayout):
        return jnp.einsum("rsb,sbpd->rbpd", weights[:, :, layout.answer], values)
    return weighted(weights, values)


def asking(values: Float[Array, "source batch pos d_model"], layout: Layout) -> Array:
    """The values of all sources at the positions that ask."""
    return at_answer(values, layout.answer, 2) if isinstance(layout, AnswerLayout) else values


def example_before(z: Float[Array, "source batch pos d_model"]) -> Float[Array, "source batch pos d_model"]:
    """What a source writes for the example before, and for the first what it writes for the last."""
    return jnp.roll(z, 1, 1)


def _reads(graph: Graph, terms: Sequence[tuple[Array, Array]], layout: Layout) -> dict[str, Array]:
    """What each reader reads beside the ablated stream, by the name of its site."""
    h, kv = graph.n_heads, graph.n_kv_heads
    if isinstance(layout, AnswerLayout):
        # queries and the MLP at one position, keys and values at all
        apart = [jnp.concatenate([w[:h], w[h + 2 * kv :]]) for w, _ in terms]
        asked = _sum([weighted_at(w, asking(d, layout), layout) for w, (_, d) in zip(apart, terms, strict=True)])
        queries, mlp = asked[:h], asked[h:]
        seen = _sum([weighted(w[h : h + 2 * kv], d) for w, d in terms])
    else:
        everything = _sum([weighted(w, d) for w, d in terms])
        queries, seen, mlp = everything[:h], everything[h : h + 2 * kv], everything[h + 2 * kv :]
    return {"attn.q_in": queries, "attn.k_in": seen[:kv], "attn.v_in": seen[kv:], "mlp.in": mlp}


def _sum(parts: list[Array]) -> Array:
    # a layout of its own for the product: merged into what reads it, it is an order of magnitude slower on a CPU
    return jax.lax.optimization_barrier(sum(parts[1:], parts[0]))


class _EdgeTap(SourceTap):
    """A tap that feeds every reader its own stream and records how what the sources write differs from the patch."""

    def __init__(
        self,
        graph: Graph,
        params: Block,
        base: Array,
        reads: dict[str, Array],
        to_mlp: Array,
        patch: Array | None,
        layout: Layout,
    ):
        super().__init__(graph, params)
        self._base, self._reads, self._to_mlp, self._patch, self._layout = base, reads, to_mlp, patch, layout
        self._asking_base = layout.asking(base)
        self._rest, self._mlp_rest = unsourced(graph, params)
        self._ablated: list[Array] = []

    def touches(self, name: str) -> bool:
        return name in ("attn.q_in", "attn.k_in", "attn.v_in") or super().touches(name)

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """The readers of that name, each of its own stream."""
        base = self._asking_base if name == "attn.q_in" else self._base
        return projected((base[None] + self._reads[name]).astype(w.dtype), norm, w)

    def __call__(self, name: str, x: Array) -> Array:
        if name == "attn_out" and self._graph.normed_bias:
            # what the norm leaves of the bias in this very run
            self._rest = widened(x) - self.written[0].sum(0) - self._ablated[0].sum(0)
        if name == "mlp.in":
            read = self._after_heads() + self._reads[name][0]
            if not self._graph.parallel:
                # the heads of this layer, which had written nothing yet when the reads were made
                read = read + weighted_at(self._to_mlp, self.written[0], self._layout)[0]
            return read.astype(x.dtype)
        return super().__call__(name, x)

    def write(self, z: Array) -> None:
        start, z = sum(len(part) for part in self.written), widened(z)
        self._ablated.append(example_before(z) if self._patch is None else self._patch[start : start + len(z)])
        super().write(z - self._ablated[-1])

    def base_after(self) -> Float[Array, "batch query d_model"]:
        """The ablated stream after the layer."""
        return self._asking_base + sum(part.sum(0) for part in self._ablated) + self._rest + self._mlp_rest

    def _after_heads(self) -> Array:
        """The ablated stream that the MLP reads."""
        if self._graph.parallel:
            return self._asking_base
        return self._asking_base + self._ablated[0].sum(0) + self._rest
