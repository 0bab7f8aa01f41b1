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
    # two rows for the patched stream of a layer, as attention and as the MLP read it; with them the product is what the
    # readers read
    rows = jnp.concatenate([jnp.zeros((2, *patch.shape[1:]), patch.dtype), (common.source - patch[0])[None]])
    for layers in chunks(graph.n_layers):
        # room for a chunk more: a layer reads all rows there are
        rows = jnp.pad(rows, ((0, len(layers) * graph.layer_sources), (0, 0), (0, 0), (0, 0)))
        some = jnp.ones((len(layers), 2), bool) if computed is None else computed[layers.start : layers.stop]
        # those that are computed, in their order, and then the others, which the loop does not come to
        order = layers.start + jnp.argsort(~some.any(1), stable=True)

        def body(i, rows, *, order=order):
            wanted = None if computed is None else computed[order[i]]
            return _layer(model, common, kept, order[i], rows, mask, wanted)

        n = len(layers) if computed is None else some.any(1).sum(dtype=jnp.int32)
        rows = jax.lax.fori_loop(0, n, body, rows)
    at_output = kept[:, -1:] if kept.ndim == 2 else kept[:, -1, output_pos]
    written = jnp.take_along_axis(rows[2:], output_pos[None, :, None, None], axis=2)[:, :, 0]
    x = jnp.take_along_axis(common.before[-1], output_pos[:, None, None], axis=1)
    return x + jnp.einsum("sb,sbd->bd", jnp.broadcast_to(at_output, written.shape[:2]), written)[:, None]


def _layer(
    model: Decoder,
    common: Shared,
    kept: Array,
    number: Array,
    rows: Array,
    mask: Array,
    wanted: Bool[Array, "2"] | None,
) -> Float[Array, "row batch pos d_model"]:
    """`rows` with how what a layer's sources write differs from the patch, where anybody wants it."""
    graph = Graph.of(model.config)
    h, readers, first = graph.n_heads, graph.layer_readers, 1 + number * graph.layer_sources
    rows = jax.lax.dynamic_update_slice_in_dim(rows, jnp.stack([common.before[number], common.middle[number]]), 0, 0)
    edges = jax.lax.dynamic_slice_in_dim(kept[: len(rows) - 2], number * readers, readers, 1)

    def reads(start: int) -> Float[Array, "reader batch pos d_model"]:
        """What the layer's readers from `start` on read."""
        into_mlp = jnp.arange(start, readers) >= readers - graph.has_mlp
        bases = jnp.stack([~into_mlp, into_mlp]).astype(kept.dtype).reshape(2, -1, *(1,) * (kept.ndim - 2))
        weights = jnp.concatenate([jnp.broadcast_to(bases, (2, *edges[0, start:].shape)), edges[:, start:]])
        # a layout of its own for the product, which is slow merged into what reads it
        return jax.lax.optimization_barrier(weighted(weights, rows))

    def written(read: Array, into_mlp: Array) -> list[Array]:
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), model.blocks)
        tap = _CircuitTap(graph, params, common, number, read, into_mlp)
        # what nothing reads of this is not compiled: the stream, and either the MLP or the heads
        block(model.layer(number, params), common.before[number], tap, model.config, Prompts(mask))
        return tap.written

    def difference(out: Array, start: int) -> Array:
        return out - jax.lax.dynamic_slice_in_dim(common.patch, first + start, len(out))

    def heads() -> tuple[Array, Array]:
        """What they write, and what the MLP reads."""
        read = reads(0)
        into_mlp, out = read[-1], difference(written(read, read[-1])[0], 0)
        if graph.has_mlp and not graph.parallel:
            into_mlp = into_mlp + weighted(jax.lax.dynamic_slice_in_dim(edges[:, -1:], first, h), out)[0]
        return out, into_mlp

    def no_heads() -> tuple[Array, Array]:
        return jnp.zeros((h, *rows.shape[1:]), rows.dtype), reads(readers - 1)[0]

    def others(into_mlp: Array) -> Array:
        read = jnp.broadcast_to(into_mlp, (readers, *into_mlp.shape))
        return difference(jnp.concatenate(written(read, into_mlp)[1:]), h)

    def nothing(_: Array) -> Array:
        return jnp.zeros((graph.mlp_sources, *rows.shape[1:]), rows.dtype)

    out, into_mlp = heads() if wanted is None else jax.lax.cond(wanted[0], heads, no_heads)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, out, 2 + first, 0)
    if not graph.has_mlp:
        return rows
    out = others(into_mlp) if wanted is None else jax.lax.cond(wanted[1], others, nothing, into_mlp)
    return jax.lax.dynamic_update_slice_in_dim(rows, out, 2 + first + h, 0)


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
