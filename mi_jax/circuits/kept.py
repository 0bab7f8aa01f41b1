"""Runs of circuits: every reader reads the ablated stream, and what the kept edges into it change.

`reads[r] = Σ_s patch[s] + Σ_{s → r kept} (z[s] − patch[s])`, over the sources s that are written before r. These are
the numbers of `masked_forward`, in another order: there the run's own stream is summed up, and what the edges outside
the circuit change is added. Here no stream is summed up, nothing is computed that reaches the logits along no path of
kept edges, and what all circuits have in common (`Shared`) is computed once: the ablated stream, and the projections
with the norm before them folded in, so that no reader's stream is written a second time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import chunks, weighted
from mi_jax.circuits.search.order import feeds
from mi_jax.circuits.shared import Shared
from mi_jax.circuits.sources import SourceTap
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import Norm, widened

_READS = ("attn.q_in", "attn.k_in", "attn.v_in")


def needed(
    graph: Graph, circuits: Bool[np.ndarray, "circuit source reader *pos"], *, from_input: bool
) -> Bool[np.ndarray, "circuit layer 2"]:
    """Whether some head, and the MLP, of a layer is on a path to the logits.

    Args:
      from_input: the patch is itself a run of the model, so that a source that no path from the input reaches writes
        what the patch has, and need not be computed either.
    """
    fed = feeds(graph)
    edges = circuits if circuits.ndim == 3 else np.any(circuits, axis=3)
    useful = np.zeros((len(edges), graph.n_readers), bool)
    useful[:, -1] = True
    alive = np.zeros((len(edges), graph.n_sources), bool)
    for s in range(graph.n_sources - 1, -1, -1):
        alive[:, s] = (edges[:, s] & useful).any(1)
        useful |= alive[:, s, None] & fed[None, :, s]
    if from_input:
        reached = np.zeros_like(alive)
        reached[:, 0] = True
        for s in range(1, graph.n_sources):
            reached[:, s] = (edges[:, :, fed[:, s]].any(2) & reached).any(1)
        alive &= reached
    layers = alive[:, 1:].reshape(len(edges), graph.n_layers, graph.layer_sources)
    return np.stack([layers[:, :, : graph.n_heads].any(2), layers[:, :, graph.n_heads :].any(2)], axis=2)


def circuit_stream(
    model: Decoder,
    common: Shared,
    kept: Float[Array, "source reader"] | Float[Array, "source reader pos"],
    mask: Bool[Array, "batch pos"],
    output_pos: Int[Array, " batch"],
    computed: Bool[Array, "layer 2"] | None = None,
) -> Float[Array, "batch 1 d_model"]:
    """What the logits are read from, at one position, in the run of one circuit.

    Args:
      common: `shared` of the model, the clean tokens and the ablation.
      kept: 1 on edges of the circuit, with a third axis at every position where the reader reads.
      mask: real tokens.
      output_pos: the position of each prompt.
      computed: heads and MLPs that are, of every layer (`needed`); None computes all.
    """
    graph, patch = Graph.of(model.config), common.patch
    per_layer, readers, rest = graph.layer_sources, graph.layer_readers, patch.shape[1:]
    ones = jnp.stack([jnp.arange(readers) < readers - graph.has_mlp, jnp.arange(readers) >= readers - graph.has_mlp])
    bases = jnp.broadcast_to(
        ones.astype(kept.dtype).reshape(2, readers, *(1,) * (kept.ndim - 2)), (2, readers, *kept.shape[2:])
    )
    differences: list[Array] = []
    for layers in chunks(graph.n_layers):
        first, begin, n = 1 + layers.start * per_layer, layers.start * readers, len(layers)
        last = first + n * per_layer
        # two rows for the patched stream of the layer, as attention and as the MLP read it; with them the product is
        # what the readers read
        start = 0 if layers.start == 0 else first
        own = jnp.zeros((2 + last - start, *rest), patch.dtype)
        if start == 0:
            own = jax.lax.dynamic_update_slice_in_dim(own, (common.source - patch[0])[None], 2, 0)
        by_layer = jnp.moveaxis(
            kept[:last, begin : begin + n * readers].reshape(last, n, readers, *kept.shape[2:]), 1, 0
        )
        earlier = tuple(differences)

        def body(own, row, *, earlier=earlier, layers=layers, start=start, first=first):
            number, weights, wanted = row
            at = (number - layers.start) * per_layer
            streams = jnp.stack([common.before[number], common.middle[number]])
            own = jax.lax.dynamic_update_slice_in_dim(own, streams, 0, 0)

            def run():
                reads = weighted(jnp.concatenate([bases, weights[start:]]), own)
                begins = 0
                for part in earlier:
                    reads = reads + weighted(_padded(weights[begins : begins + len(part) - 2]), part)
                    begins += len(part) - 2
                # a layout of its own for the product, which is slow merged into what reads it
                reads = jax.lax.optimization_barrier(reads)
                mine = jax.lax.dynamic_slice_in_dim(weights, first + at, per_layer)
                return _layer(model, common, number, reads, mine, mask, wanted)

            if wanted is None:
                written = run()
            else:
                written = jax.lax.cond(wanted.any(), run, lambda: jnp.zeros((per_layer, *rest), patch.dtype))
            return jax.lax.dynamic_update_slice_in_dim(own, written, 2 + (first - start) + at, 0), None

        numbers = jnp.asarray(list(layers), jnp.int32)
        some = None if computed is None else computed[layers.start : layers.stop]
        own, _ = jax.lax.scan(body, own, (numbers, by_layer, some))
        differences.append(own)
    x = jnp.take_along_axis(common.before[-1], output_pos[:, None, None], axis=1)
    begin = 0
    for part in differences:
        rows = kept[begin : begin + len(part) - 2, -1]
        rows = _padded(rows[:, None] if kept.ndim == 2 else rows[:, output_pos])
        written = jnp.take_along_axis(part, output_pos[None, :, None, None], axis=2)[:, :, 0]
        x = x + jnp.einsum("sb,sbd->bd", jnp.broadcast_to(rows, written.shape[:2]), written)[:, None]
        begin += len(part) - 2
    return x


def _padded(weights: Array) -> Array:
    """Weights of a part's sources, with zeros for the two rows before them."""
    return jnp.pad(weights, ((2, 0), *((0, 0),) * (weights.ndim - 1)))


class _CircuitTap(SourceTap):
    """A tap that gives every reader its stream, attention's through the folded projections."""

    def __init__(self, graph: Graph, params: Block, common: Shared, number: Array, reads: Array, into_mlp: Array):
        super().__init__(graph, params)
        self._common, self._number, self._reads, self._into_mlp = common, number, reads, into_mlp
        self._projected: Array | None = None

    def touches(self, name: str) -> bool:
        return name in _READS or super().touches(name)

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """The readers of that name, projected."""
        h, kv = self._graph.n_heads, self._graph.n_kv_heads
        start, n = {"attn.q_in": (0, h), "attn.k_in": (h, kv), "attn.v_in": (h + kv, kv)}[name]
        if self._projected is None:
            self._projected = self._of_all(norm)
        return jnp.moveaxis(self._projected[start : start + n], 0, 2)

    def _of_all(self, norm: Norm | None) -> Float[Array, "reader batch pos d_head"]:
        # all at once, the MLP's included, of which nothing comes: a part of the streams would be copied first
        w, total, bias = (a[self._number] for a in self._common.projections)
        out = jnp.einsum("nbpd,ndh->nbph", self._reads, w)
        if norm is None or norm.weight is None:
            return out
        exact = widened(self._reads)
        if norm.bias is not None:
            mean = exact.mean(-1, keepdims=True)
            out = out - mean.astype(out.dtype) * total[:, None, None, :]
            exact = exact - mean
        return out * norm.scale(exact).astype(out.dtype) + bias[:, None, None, :]

    def __call__(self, name: str, x: Array) -> Array:
        return self._into_mlp if name == "mlp.in" else super().__call__(name, x)


def _layer(
    model: Decoder,
    common: Shared,
    number: Array,
    reads: Array,
    weights: Array,
    mask: Array,
    wanted: Array | None,
) -> Float[Array, "source batch pos d_model"]:
    """How what a layer's sources write differs from the patch; zeros where nobody wants them."""
    graph = Graph.of(model.config)
    h, first = graph.n_heads, 1 + number * graph.layer_sources

    def patched(start: int, n: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(common.patch, first + start, n)

    def written(into_mlp: Array) -> list[Array]:
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), model.blocks)
        tap = _CircuitTap(graph, params, common, number, reads, into_mlp)
        # what nothing reads of this is not compiled: the stream, and either the MLP or the heads
        block(model.layer(number, params), common.before[number], tap, model.config, Prompts(mask))
        return tap.written

    def attention() -> Array:
        return written(reads[0])[0] - patched(0, h)

    def rest(heads: Array) -> Array:
        into_mlp = reads[-1]
        if not graph.parallel:
            into_mlp = into_mlp + weighted(weights[:h, -1:], heads)[0]
        return jnp.concatenate(written(into_mlp)[1:]) - patched(h, graph.mlp_sources)

    if wanted is None:
        heads = attention()
        return jnp.concatenate([heads, rest(heads)]) if graph.has_mlp else heads

    def nothing(n: int) -> Array:
        return jnp.zeros((n, *common.patch.shape[1:]), common.patch.dtype)

    heads = jax.lax.cond(wanted[0], attention, lambda: nothing(h))
    if not graph.has_mlp:
        return heads
    others = jax.lax.cond(wanted[1], rest, lambda heads: nothing(graph.mlp_sources), heads)
    return jnp.concatenate([heads, others])
