"""Layers of the runs of circuits (`mi_jax.circuits.kept`): what the readers of each read, and what its sources write.

The first layer has nothing to read but the clean input or the ablated one. The last is read at one position alone, so
its heads ask there and its MLP computes there. What sources write is given as its difference from the ablated values.
"""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.answer import AnswerLayout, at_answer
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import weighted
from mi_jax.circuits.needed import Needs
from mi_jax.circuits.shared import READS, Shared, Written
from mi_jax.circuits.sources import SourceTap
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Layout, Prompts
from mi_jax.models.norm import Norm


class Run(NamedTuple):
    """The run of one circuit; see `mi_jax.circuits.kept.circuit_stream`."""

    model: Decoder
    common: Shared
    kept: Float[Array, "source reader"] | Float[Array, "source reader pos"]
    mask: Bool[Array, "batch pos"]


class _CircuitLayer(abc.ABC):
    """A layer of the run of a circuit."""

    def __init__(self, run: Run, number: Array | int):
        self.run, self.number = run, number
        self.graph = Graph.of(run.model.config)
        self.first_source = 1 + number * self.graph.layer_sources
        readers = self.graph.layer_readers
        # of all sources, into the readers of this layer
        self.edges = jax.lax.dynamic_slice_in_dim(run.kept, number * readers, readers, 1)

    @abc.abstractmethod
    def attention(self, changed: Bool[Array, " reader"] | None) -> tuple[list[Array], Array]:
        """Queries, keys and values `[n batch query d_head]`, and what `into_mlp` gives.

        Args:
          changed: readers that read something else than the ablated stream, for a layer that can leave the others out;
            None where all may.
        """

    @abc.abstractmethod
    def into_mlp(self) -> Float[Array, "batch query d_model"]:
        """What the MLP reads, without the heads of this layer."""

    @property
    def layout(self) -> Layout:
        """Which positions the layer is computed at."""
        return Prompts(self.run.mask)

    def at_queries(self, x: Float[Array, "batch pos ..."]) -> Array:
        """Something of every position, at those that the layer is computed at."""
        return self.layout.asking(x)

    def sources(self, needed: Needs | None) -> list[Float[Array, "source batch query d_model"]]:
        """How what the layer's sources write differs from the ablated values; zeros where nobody wants it.

        The heads come first, and then, where there are some, the MLP or the experts.

        Args:
          needed: None where everything is.
        """
        graph, x = self.graph, self.at_queries(self.run.common.last)

        def heads() -> tuple[Array, Array]:
            projected, into_mlp = self.attention(None if needed is None else jnp.asarray(needed.readers))
            out = self._written(projected, into_mlp)[0]
            if graph.has_mlp and not graph.parallel:
                own = jax.lax.dynamic_slice_in_dim(self.edges[:, -1:], self.first_source, graph.n_heads)
                into_mlp = into_mlp + self.weighted(own, out)[0]
            return out, into_mlp

        def no_heads() -> tuple[Array, Array]:
            return jnp.zeros((graph.n_heads, *x.shape), x.dtype), self.into_mlp()

        def others(into_mlp: Array) -> Array:
            return jnp.concatenate(self._written(None, into_mlp)[1:])

        def nothing(_: Array) -> Array:
            return jnp.zeros((graph.mlp_sources, *x.shape), x.dtype)

        out, into_mlp = heads() if needed is None else jax.lax.cond(needed.parts[0], heads, no_heads)
        if not graph.has_mlp:
            return [out]
        more = others(into_mlp) if needed is None else jax.lax.cond(needed.parts[1], others, nothing, into_mlp)
        return [out, more]

    def split(self, projected: Float[Array, "reader batch pos d_head"]) -> list[Array]:
        """Queries, keys and values."""
        h, kv = self.graph.n_heads, self.graph.n_kv_heads
        return jnp.split(projected, [h, h + kv])

    def weighted(self, weights: Array, rows: Array) -> Array:
        """For every reader the weighted sum over rows, at the positions that the layer is computed at."""
        return weighted(weights, rows)

    def with_bases(self, edges: Array, *, into_mlp: slice) -> Array:
        """The weights of the two rows of the ablated stream above those of edges, some of whose readers are the MLP."""
        second = jnp.zeros(edges.shape[1], bool).at[into_mlp].set(self.graph.has_mlp)
        bases = jnp.stack([~second, second]).astype(edges.dtype).reshape(2, -1, *(1,) * (edges.ndim - 2))
        return jnp.concatenate([jnp.broadcast_to(bases, (2, *edges.shape[1:])), edges])

    def _written(self, projected: list[Array] | None, into_mlp: Array) -> list[Array]:
        run, number = self.run, jnp.asarray(self.number, jnp.int32)
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), run.model.blocks)
        tap = _CircuitTap(self, params, projected, into_mlp)
        # what nothing reads of this is not compiled: the stream, and either the MLP or the heads
        block(run.model.layer(number, params), run.common.bases[number, 0], tap, run.model.config, self.layout)
        return tap.written


class FirstLayer(_CircuitLayer):
    """The layer that has only the input to read."""

    def __init__(self, run: Run):
        super().__init__(run, 0)

    def attention(self, changed: Array | None) -> tuple[list[Array], Array]:
        common = self.run.common
        kept = self.edges[0, : len(common.first)]
        kept = kept.reshape(len(kept), 1, -1, 1) > 0
        return self.split(jnp.where(kept, common.first, common.projected[0])), self.into_mlp()

    def into_mlp(self) -> Array:
        common = self.run.common
        return common.bases[0, 1] + self.weighted(self.edges[:1, -1:], common.source[None])[0]


class MiddleLayer(_CircuitLayer):
    """A layer that reads what earlier ones wrote.

    Attributes:
      rows: the ablated stream as attention and as the MLP of this layer read it, and the differences of all sources,
        zeros for those that are not yet written.
    """

    def __init__(self, run: Run, number: Array | int, rows: Float[Array, "row batch pos d_model"]):
        super().__init__(run, number)
        self.rows = jax.lax.dynamic_update_slice_in_dim(rows, run.common.bases[number], 0, 0)
        self._edges = self.edges[: len(rows) - 2]

    def attention(self, changed: Array | None) -> tuple[list[Array], Array]:
        projected = self.run.common.projected[self.number]
        n = len(projected)
        if changed is None:
            out, into_mlp = self._read(jnp.arange(n, dtype=jnp.int32))
            return self.split(out), into_mlp
        # as many as one of a few programs reads, of which the first are those that have to
        order = jnp.argsort(~changed, stable=True).astype(jnp.int32)

        def some(k: int):
            def read(_) -> tuple[Array, Array]:
                out, into_mlp = self._read(order[:k])
                return projected.at[order[:k]].set(out, unique_indices=True), into_mlp

            return read

        rooms = sorted({-(-n * share // 3) for share in (1, 2, 3)})
        enough = sum((changed.sum(dtype=jnp.int32) > k).astype(jnp.int32) for k in rooms[:-1])
        out, into_mlp = jax.lax.switch(enough, [some(k) for k in rooms], None)
        return self.split(out), into_mlp

    def _read(self, readers: Int[Array, " some"]) -> tuple[Array, Array]:
        """What some of attention's readers project, and what the MLP reads."""
        if self.graph.has_mlp:
            readers = jnp.append(readers, self.graph.layer_readers - 1)
        weights = self.with_bases(self._edges[:, readers], into_mlp=slice(-1, None))
        # readers first, which XLA has a faster product for where they are few
        by_reader = jax.lax.optimization_barrier(jnp.moveaxis(weights, 0, 1))
        reads = _apart(self.weighted(jnp.moveaxis(by_reader, 1, 0), self.rows))
        # all at once, the MLP's included, of which nothing comes: a part of the streams would be copied first
        out = self.run.common.projections.project(reads, self.number, readers)
        return out[: len(out) - self.graph.has_mlp], reads[-1]

    def into_mlp(self) -> Array:
        return self.weighted(self.with_bases(self._edges[:, -1:], into_mlp=slice(None)), self.rows)[0]


class LastLayer(MiddleLayer):
    """The layer that only the logits read, at one position.

    Attributes:
      rows_at_output: `rows` at that position.
    """

    def __init__(self, run: Run, number: int, rows: Array, output_pos: Int[Array, " batch"]):
        super().__init__(run, number, rows)
        self._at = output_pos
        self.rows_at_output = at_answer(self.rows, output_pos, 2)

    @property
    def layout(self) -> Layout:
        return AnswerLayout(self.run.mask, self._at)

    def weighted(self, weights: Array, rows: Array) -> Array:
        if weights.ndim == 2:
            return weighted(weights, rows)
        return jnp.einsum("srb,sbpd->rbpd", weights[:, :, self._at], rows)

    def attention(self, changed: Array | None) -> tuple[list[Array], Array]:
        h, n, project = self.graph.n_heads, len(self.run.common.first), self.run.common.projections.project
        weights = self.with_bases(self._edges, into_mlp=slice(n, None))
        asked = self.weighted(weights, self.rows_at_output)
        seen = _apart(weighted(weights[:, h:n], self.rows))
        q, kv = project(asked[:h], self.number, slice(0, h)), project(seen, self.number, slice(h, n))
        return [q, *jnp.split(kv, 2)], asked[-1]

    def into_mlp(self) -> Array:
        return self.weighted(self.with_bases(self._edges[:, -1:], into_mlp=slice(None)), self.rows_at_output)[0]


def _apart(reads: Float[Array, "reader batch pos d_model"]) -> Float[Array, "reader batch pos d_model"]:
    """The same, computed before anything that reads it, with which the product would be slow."""
    # as the product gives it: other shapes would be copies of it
    return jax.lax.optimization_barrier(reads.reshape(len(reads), -1)).reshape(reads.shape)


class _CircuitTap(SourceTap):
    """A tap that gives a layer's readers what they read, and takes differences of what its sources write."""

    def __init__(self, layer: _CircuitLayer, params: Block, projected: list[Array] | None, into_mlp: Array):
        super().__init__(layer.graph, params)
        self._layer, self._params, self._into_mlp = layer, params, into_mlp
        self._projected = dict(zip(READS, projected or (), strict=False))

    def touches(self, name: str) -> bool:
        return name in READS or super().touches(name)

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """The readers of that name, projected; zeros where only the MLP is wanted."""
        if name in self._projected:
            return jnp.moveaxis(self._projected[name], 0, 2)
        return jnp.zeros((*x.shape[:2], *w.shape[1:]), x.dtype)

    def __call__(self, name: str, x: Array) -> Array:
        if name == "mlp.in":
            return self._into_mlp
        ablated, number = self._layer.run.common.ablated, self._layer.number
        if isinstance(ablated, Written):
            if name == "attn.z":
                z = x - self._layer.at_queries(ablated.z[number])
                self.written.append(jnp.einsum("bpnh,nhd->nbpd", z, self._params.attn.o))
            elif name == "mlp_out" and ablated.mlp is not None:
                self.written.append((x - self._layer.at_queries(ablated.mlp[number]))[None])
            return x
        return super().__call__(name, x)

    def write(self, z: Array) -> None:
        ablated, start = self._layer.run.common.ablated, sum(len(part) for part in self.written)
        assert not isinstance(ablated, Written)
        values = jax.lax.dynamic_slice_in_dim(ablated, self._layer.first_source + start, len(z))
        self.written.append(z - jax.vmap(self._layer.at_queries)(values))
