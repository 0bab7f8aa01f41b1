"""The masked-edge forward: one program in which every edge can carry another run's value.

With `edges[s, r]` in [0, 1], reader r reads `Σ_s z[s] + edges[s, r] · (patch[s] − z[s])`, where `z[s]` is what source s
writes in this very run. All ones on the edges gives the run that `patch` came from; zeros give the run itself.
The block is the model's own: only the tap differs (`mi_jax.circuits.runs.layer`).

Layers run in chunks, one scan each. A chunk reads the differences of earlier chunks as constants and carries only its
own, so that nothing touches the sources of chunks still to come, and a gradient keeps per layer the differences of one
chunk instead of all.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.answer import AnswerLayout
from mi_jax.circuits.runs.layer import asking, example_before, masked_layer, weighted_at
from mi_jax.circuits.runs.sources import embedded as embedded
from mi_jax.circuits.runs.sources import source_outputs as source_outputs
from mi_jax.core.errors import InputError
from mi_jax.core.taps import Tap
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Layout, Prompts
from mi_jax.models.norm import widened


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
      patch: the sources of another run (`source_outputs`), or what else stands for them (`ablation_values`). None: what
        the same source writes in this very run for the example before, the first taking the last one's.
      output_pos: the one position of every prompt that logits are wanted of; None for all.
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
    computed: Bool[Array, " layer"] | None = None,
    chunk: int | None = None,
    remat: bool = True,
) -> Float[Array, "batch out_pos d_model"]:
    """What the logits of `masked_forward` are read from.

    Args:
      computed: False for layers whose sources write what the patch has, without being run; None runs all.
    """
    graph = Graph.of(model.config)
    _check_shapes(graph, tokens, edges, patch)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    base, differences = start(model, tokens, patch)
    kept = kept_weights(graph, edges)
    for layers in chunks(graph.n_layers, chunk):
        base, differences = _chunk(model, base, differences, kept, patch, mask, layers, computed, remat)
    layout = Prompts(mask) if output_pos is None else AnswerLayout(mask, output_pos)
    x = layout.asking(base) + into_logits(kept, [asking(d, layout) for d in differences], layout)
    return x.astype(stream_dtype(model))


def start(model: Decoder, tokens: Array, patch: Array | None) -> tuple[Array, tuple[Array, ...]]:
    """The ablated stream before the first layer, and by how much the input differs from the patch."""
    x = widened(embedded(model, tokens))[None]
    base = example_before(x) if patch is None else widened(patch[:1])
    return base[0], (x - base,)


def kept_weights(graph: Graph, edges: Float[Array, "source reader *pos"]) -> Float[Array, "reader source *pos"]:
    """The weights of what is not ablated; readers first, so that a product with them is nearly twice as fast."""
    exists = jnp.asarray(graph.edges).reshape(*graph.edges.shape, *(1,) * (edges.ndim - 2))
    return jnp.moveaxis(jnp.where(exists, 1 - widened(edges), 0), 0, 1)


def chunks(n_layers: int, size: int | None = None) -> list[range]:
    """The layers in chunks of this size; by default one chunk of up to four layers, else about √n chunks."""
    size = size or max(1, n_layers if n_layers <= 4 else math.ceil(math.sqrt(n_layers)))
    return [range(i, min(i + size, n_layers)) for i in range(0, n_layers, size)]


def _chunk(
    model: Decoder,
    base: Array,
    earlier: tuple[Array, ...],
    kept: Array,
    patch: Array | None,
    mask: Array,
    layers: range,
    computed: Array | None,
    remat: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """The ablated stream after these layers, and the differences of their sources beside the earlier ones."""
    graph = Graph.of(model.config)
    n, per_layer, readers = len(layers), graph.layer_sources, graph.layer_readers
    first, begin = 1 + layers.start * per_layer, layers.start * readers
    last = first + n * per_layer
    own = jnp.zeros((n * per_layer, *base.shape), base.dtype)
    if layers.start == 0 or not remat:
        # without a gradient one product is faster than one for every chunk; and a product over one source would be
        # fused into all that reads it, and made again for each
        earlier, own = (), jnp.concatenate([*earlier, own])
    starts = [sum(len(d) for d in earlier[:i]) for i in range(len(earlier) + 1)]
    bounds = list(zip(starts, [*starts[1:], last], strict=True))
    by_layer = kept[begin : begin + n * readers, :last].reshape(n, readers, last, *kept.shape[2:])

    def body(carry, row):
        base, own = carry
        number, weights, run = row
        at = (number - layers.start) * per_layer
        terms = [(weights[:, a:b], d) for (a, b), d in zip(bounds, (*earlier, own), strict=True)]
        patched = None if patch is None else jax.lax.dynamic_slice_in_dim(patch, first + at, per_layer)
        to_mlp = jax.lax.dynamic_slice_in_dim(weights[-1:], first + at, graph.n_heads, 1)
        base, written = masked_layer(model, number, base, terms, to_mlp, patched, Prompts(mask), computed=run)
        return (base, jax.lax.dynamic_update_slice_in_dim(own, written, first - starts[-1] + at, 0)), None

    numbers = jnp.asarray(list(layers), jnp.int32)
    run = None if computed is None else computed[layers.start : layers.stop]
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    (base, own), _ = jax.lax.scan(step, (base, own), (numbers, by_layer, run))
    return base, (*earlier, own)


def stream_dtype(model: Decoder) -> jnp.dtype:
    """Of the stream of a plain run."""
    return jax.eval_shape(embedded, model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).dtype


def into_logits(
    kept: Float[Array, "reader source *pos"], asked: Sequence[Array], layout: Layout
) -> Float[Array, "batch query d_model"]:
    """What the edges into the logits add to the ablated stream, from the differences of all sources at what asks."""
    terms, start = [], 0
    for values in asked:
        terms.append(weighted_at(kept[-1:, start : start + len(values)], values, layout)[0])
        start += len(values)
    return sum(terms[1:], terms[0])


def head_logits(model: Decoder, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos d_vocab"]:
    """Logits from the stream after the last layer."""
    return model.head(x, Tap(model.site_table, {}, (), {}, None))


def _check_shapes(graph: Graph, tokens: Array, edges: Array, patch: Array | None) -> None:
    shape, written = (graph.n_sources, graph.n_readers), (graph.n_sources, *tokens.shape)
    if edges.shape not in (shape, (*shape, tokens.shape[1])) or (patch is not None and patch.shape[:3] != written):
        raise InputError(
            f"edges have shape {shape} [source reader], or {(*shape, tokens.shape[1])} with a weight for every "
            f"position, and the patch has {written} [source batch pos], then d_model; got edges of shape {edges.shape} "
            f"and a patch of shape {None if patch is None else patch.shape}"
        )
