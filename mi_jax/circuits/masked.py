"""The masked-edge forward: one program in which every edge can carry another run's value.

With `edges[s, r]` in [0, 1], reader r reads `stream + Σ_s edges[s, r] · (patch[s] − z[s])`, where `z[s]` is what source
s writes in this very run. All ones on the edges gives the run that `patch` came from; zeros give the run itself.
The block is the model's own: only the tap differs.

Layers run in chunks, one scan each. A chunk reads the differences of earlier chunks as constants and carries only its
own, so that nothing touches the sources of chunks still to come, and a gradient keeps per layer the differences of one
chunk instead of all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.sources import SourceTap
from mi_jax.circuits.sources import embedded as embedded
from mi_jax.circuits.sources import source_outputs as source_outputs
from mi_jax.core.errors import InputError
from mi_jax.core.taps import Tap
from mi_jax.models.attention import projected
from mi_jax.models.block import Block, block
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts
from mi_jax.models.norm import Norm


class State(NamedTuple):
    """A masked run between two chunks of layers.

    Attributes:
      x: the stream that the sources of this run add up to.
      differences: `patch − z` of all sources written so far, `[source batch pos d_model]` for every chunk; the input is
        the first of the first chunk, and alone before it.
    """

    x: Array
    differences: tuple[Array, ...]


class _EdgeTap(SourceTap):
    """A tap that feeds every reader its own stream and records how what the sources write differs from the patch."""

    def __init__(self, graph: Graph, params: Block, deltas: Array, weights: Array, patch: Array | None):
        super().__init__(graph, params)
        self._deltas, self._weights, self._patch = deltas, weights, patch

    def touches(self, name: str) -> bool:
        return name in ("attn.q_in", "attn.k_in", "attn.v_in") or super().touches(name)

    def project(self, name: str, x: Array, norm: Norm | None, w: Array) -> Array:
        """The readers of that name, each of its own stream."""
        h, kv = self._graph.n_heads, self._graph.n_kv_heads
        start, n = {"attn.q_in": (0, h), "attn.k_in": (h, kv), "attn.v_in": (h + kv, kv)}[name]
        return projected(x[None] + self._deltas[start : start + n], norm, w)

    def __call__(self, name: str, x: Array) -> Array:
        if name == "mlp.in":
            h = self._graph.n_heads
            x = x + self._deltas[-1]
            # the heads of this layer, which had written nothing yet when the deltas were made
            return x if self._graph.parallel else x + weighted(self._weights[:h, -1:], self.written[0])[0]
        return super().__call__(name, x)

    def write(self, z: Array) -> None:
        start = sum(len(part) for part in self.written)
        super().write(_example_before(z) - z if self._patch is None else self._patch[start : start + len(z)] - z)


def masked_forward(
    model: Decoder,
    tokens: Int[Array, "batch pos"],
    edges: Float[Array, "source reader"] | Float[Array, "source reader pos"],
    patch: Float[Array, "source batch pos d_model"] | None,
    mask: Bool[Array, "batch pos"] | None = None,
    *,
    output_pos: Int[Array, " batch"] | None = None,
    chunk: int | None = None,
    remat: bool = True,
) -> Float[Array, "batch out_pos d_vocab"]:
    """Logits of a run in which the edges with `edges[s, r] = 1` carry `patch[s]` instead of what the source wrote.

    Args:
      edges: weights in [0, 1], zero where no edge exists (`Graph.edges`); with a third axis, the weight at every
        position where the reader reads.
      patch: the sources of another run (`source_outputs`), or what else stands for them (`ablation_values`).
        None: what the same source writes in this very run for the example before, the first taking the last one's.
      chunk: layers to a chunk; None takes about the square root of their number.
      remat: a gradient runs each layer again instead of keeping what is inside it.

    Raises:
      InputError: edges or a patch of another shape.
    """
    x = masked_stream(model, tokens, edges, patch, mask, output_pos=output_pos, chunk=chunk, remat=remat)
    return head_logits(model, x)


def masked_stream(
    model: Decoder,
    tokens: Int[Array, "batch pos"],
    edges: Float[Array, "source reader"] | Float[Array, "source reader pos"],
    patch: Float[Array, "source batch pos d_model"] | None,
    mask: Bool[Array, "batch pos"] | None = None,
    *,
    output_pos: Int[Array, " batch"] | None = None,
    chunk: int | None = None,
    remat: bool = True,
) -> Float[Array, "batch out_pos d_model"]:
    """What the logits of `masked_forward` are read from."""
    graph = Graph.of(model.config)
    _check_shapes(graph, tokens, edges, patch)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    state = start(model, tokens, patch)
    for layers in chunks(graph.n_layers, chunk):
        state = advance(model, state, edges, patch, mask, layers, remat=remat)
    return _final_stream(state, edges, output_pos)


def chunks(n_layers: int, size: int | None = None) -> list[range]:
    """The layers in chunks of this size; by default one chunk of up to four layers, else about √n chunks."""
    size = size or max(1, n_layers if n_layers <= 4 else math.ceil(math.sqrt(n_layers)))
    return [range(i, min(i + size, n_layers)) for i in range(0, n_layers, size)]


def start(model: Decoder, tokens: Array, patch: Array | None) -> State:
    """The state before the first layer."""
    x = embedded(model, tokens)
    return State(x, (_example_before(x[None]) - x[None] if patch is None else (patch[0] - x)[None],))


def _example_before(z: Float[Array, "source batch pos d_model"]) -> Float[Array, "source batch pos d_model"]:
    """What the example before writes, and for the first the last."""
    return jnp.roll(z, 1, 1)


def advance(
    model: Decoder, state: State, edges: Array, patch: Array | None, mask: Array, layers: range, *, remat: bool = True
) -> State:
    """The state after these layers, which are a chunk."""
    graph = Graph.of(model.config)
    n, per_layer, readers = len(layers), graph.layer_sources, graph.layer_readers
    first, begin = 1 + layers.start * per_layer, layers.start * readers
    last = first + n * per_layer
    earlier, own = state.differences, jnp.zeros((n * per_layer, *state.x.shape), state.x.dtype)
    if layers.start == 0:
        # a product over one source would be fused into all that reads it, and made again for each
        earlier, own = (), jnp.concatenate([*earlier, own])
    starts = [sum(len(d) for d in earlier[:i]) for i in range(len(earlier) + 1)]
    bounds = list(zip(starts, [*starts[1:], last], strict=True))
    by_layer = edges[:last, begin : begin + n * readers].reshape(last, n, readers, *edges.shape[2:])

    def body(carry, row):
        x, own = carry
        number, weights = row
        at = (number - layers.start) * per_layer
        # looked up in the whole: a chunk of the weights would be copied first
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), model.blocks)
        patched = None if patch is None else jax.lax.dynamic_slice_in_dim(patch, first + at, per_layer)
        parts = zip(bounds, (*earlier, own), strict=True)
        deltas = sum(weighted(weights[a:b], difference) for (a, b), difference in parts)
        mine = jax.lax.dynamic_slice_in_dim(weights, first + at, per_layer)
        # a layout of its own for the product: merged into what reads it, it is an order of magnitude slower on a CPU
        tap = _EdgeTap(graph, params, jax.lax.optimization_barrier(deltas), mine, patched)
        x = block(model.layer(number, params), x, tap, model.config, Prompts(mask))
        own = jax.lax.dynamic_update_slice_in_dim(own, jnp.concatenate(tap.written), first - starts[-1] + at, 0)
        return (x, own), None

    numbers = jnp.asarray(list(layers), jnp.int32)
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    (x, own), _ = jax.lax.scan(step, (state.x, own), (numbers, jnp.moveaxis(by_layer, 1, 0)))
    return State(x, (*earlier, own))


def finish(model: Decoder, state: State, edges: Array, output_pos: Array | None = None) -> Array:
    """Logits from the state after the last layer."""
    return head_logits(model, _final_stream(state, edges, output_pos))


def head_logits(model: Decoder, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos d_vocab"]:
    """Logits from the stream after the last layer."""
    return model.head(x, Tap(model.site_table, {}, (), {}, None))


def _final_stream(state: State, edges: Array, output_pos: Array | None = None) -> Float[Array, "batch out_pos d_model"]:
    """What the logits are read from, after the last layer."""
    x, differences, weights = state.x, state.differences, edges[:, -1:]
    if output_pos is not None:
        x = jnp.take_along_axis(x, output_pos[:, None, None], axis=1)
        differences = tuple(jnp.take_along_axis(d, output_pos[None, :, None, None], axis=2) for d in differences)
    begin = 0
    for difference in differences:
        rows = weights[begin : begin + len(difference)]
        if output_pos is not None and edges.ndim == 3:
            x = x + jnp.einsum("sb,sbpd->bpd", rows[:, 0, output_pos], difference)
        else:
            x = x + weighted(rows, difference)[0]
        begin += len(difference)
    return x


def weighted(
    weights: Float[Array, "source reader"] | Float[Array, "source reader pos"],
    values: Float[Array, "source batch pos d_model"],
) -> Float[Array, "reader batch pos d_model"]:
    """For every reader the weighted sum over the sources."""
    return jnp.einsum("srp,sbpd->rbpd" if weights.ndim == 3 else "sr,sbpd->rbpd", weights, values)


def _check_shapes(graph: Graph, tokens: Array, edges: Array, patch: Array | None) -> None:
    shape, written = (graph.n_sources, graph.n_readers), (graph.n_sources, *tokens.shape)
    if edges.shape not in (shape, (*shape, tokens.shape[1])) or (patch is not None and patch.shape[:3] != written):
        raise InputError(
            f"edges have shape {shape} [source reader], or {(*shape, tokens.shape[1])} with a weight for every "
            f"position, and the patch has {written} [source batch pos], then d_model; got edges of shape {edges.shape} "
            f"and a patch of shape {None if patch is None else patch.shape}"
        )
