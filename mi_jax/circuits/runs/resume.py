"""Masked runs that differ in what one layer or a later one reads, resumed from a stored run before that layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.answer import AnswerLayout
from mi_jax.circuits.runs.layer import asking, masked_layer
from mi_jax.circuits.runs.masked import into_logits, kept_weights, start, stream_dtype
from mi_jax.models.decoder import Decoder
from mi_jax.models.layout import Prompts


class MaskedRun(NamedTuple):
    """A masked run that others resume.

    Attributes:
      bases: the ablated stream before every layer and after the last.
      differences: of every source, what it writes minus the patch.
    """

    bases: Float[Array, "stream batch pos d_model"]
    differences: Float[Array, "source batch pos d_model"]


def masked_run(
    model: Decoder,
    tokens: Int[Array, "batch pos"],
    edges: Float[Array, "source reader *pos"],
    patch: Float[Array, "source batch pos d_model"],
    mask: Bool[Array, "batch pos"],
) -> MaskedRun:
    """The run of `masked_forward`, with what is needed to resume it."""
    base, (first,) = start(model, tokens, patch)
    kept = kept_weights(Graph.of(model.config), edges)
    differences = jnp.zeros(patch.shape, base.dtype).at[:1].set(first)

    def body(carry, number):
        base, differences = carry
        return _advanced(model, number, base, differences, kept, patch, mask), base

    numbers = jnp.arange(model.config.n_layers, dtype=jnp.int32)
    (base, differences), bases = jax.lax.scan(body, (base, differences), numbers)
    return MaskedRun(jnp.concatenate([bases, base[None]]), differences)


def resumed_stream(
    model: Decoder,
    run: MaskedRun,
    layer: Int[Array, ""],
    edges: Float[Array, "source reader *pos"],
    patch: Float[Array, "source batch pos d_model"],
    mask: Bool[Array, "batch pos"],
    output_pos: Int[Array, " batch"],
) -> Float[Array, "batch 1 d_model"]:
    """What the logits read in a run whose edges into earlier layers are those of the stored run.

    Args:
      layer: the first that reads something else; the number of layers stands for the logits.
      edges: of this run.
    """
    n_layers, graph = model.config.n_layers, Graph.of(model.config)
    kept = kept_weights(graph, edges)

    def body(number, state):
        base, differences = state
        return _advanced(model, number, base, differences, kept, patch, mask)

    base = jax.lax.dynamic_index_in_dim(run.bases, layer, keepdims=False)
    base, differences = jax.lax.fori_loop(layer, n_layers - 1, body, (base, run.differences))

    layout = AnswerLayout(mask, output_pos)

    def last() -> tuple[Array, Array]:
        # the last layer computes what the logits read of it alone
        begin, rows = len(patch) - graph.layer_sources, kept[-1 - graph.layer_readers : -1]
        to_mlp = rows[-1:, begin : begin + graph.n_heads]
        terms = [(rows[:, :begin], differences[:begin])]
        after, written = masked_layer(model, n_layers - 1, base, terms, to_mlp, patch[begin:], layout)
        return after, jnp.concatenate([asking(differences[:begin], layout), written])

    def logits_alone() -> tuple[Array, Array]:
        return layout.asking(base), asking(run.differences, layout)

    base, asked = jax.lax.cond(layer < n_layers, last, logits_alone)
    return (base + into_logits(kept, [asked], layout)).astype(stream_dtype(model))


def _advanced(
    model: Decoder, number: Int[Array, ""], base: Array, differences: Array, kept: Array, patch: Array, mask: Array
) -> tuple[Array, Array]:
    """The state after one more layer; sources that are not yet written have no edge into it."""
    graph = Graph.of(model.config)
    first = 1 + number * graph.layer_sources
    rows = jax.lax.dynamic_slice_in_dim(kept, number * graph.layer_readers, graph.layer_readers)
    to_mlp = jax.lax.dynamic_slice_in_dim(rows[-1:], first, graph.n_heads, 1)
    # of the layer's own heads the MLP reads what they write now, not what they wrote in the stored run
    none = jnp.zeros((len(rows), graph.n_heads, *rows.shape[2:]), rows.dtype)
    terms = [(jax.lax.dynamic_update_slice_in_dim(rows, none, first, 1), differences)]
    patched = jax.lax.dynamic_slice_in_dim(patch, first, graph.layer_sources)
    base, written = masked_layer(model, number, base, terms, to_mlp, patched, Prompts(mask))
    return base, jax.lax.dynamic_update_slice_in_dim(differences, written, first, 0)
