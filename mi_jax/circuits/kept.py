"""Runs of circuits: every reader reads the ablated stream, and what the kept edges into it change.

`reads[r] = Σ_s patch[s] + Σ_{s → r kept} (z[s] − patch[s])`, over the sources s that are written before r. These are
the numbers of `masked_forward`, in another order: there the run's own stream is summed up, and what the edges outside
the circuit change is added. Here no stream is summed up, nothing is computed that reaches the logits along no path of
kept edges, and what all circuits have in common (`Shared`) is computed once: the ablated stream, and the projections
with the norm before them folded in, so that no reader's stream is written a second time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.answer import at_answer
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.kept_layers import FirstLayer, LastLayer, MiddleLayer, Run
from mi_jax.circuits.masked import chunks
from mi_jax.circuits.needed import Needs
from mi_jax.circuits.shared import Shared
from mi_jax.models.decoder import Decoder

# so many layers, or more in deep models, read the same rows, those of the chunk included that are not yet written:
# room for more is made by a copy
_CHUNK = 5


def circuit_stream(
    model: Decoder,
    common: Shared,
    kept: Float[Array, "source reader"] | Float[Array, "source reader pos"],
    mask: Bool[Array, "batch pos"],
    output_pos: Int[Array, " batch"],
    needs: Needs | None = None,
) -> Float[Array, "batch 1 d_model"]:
    """What the logits are read from, at one position, in the run of one circuit.

    Args:
      common: `shared` of the model, the clean tokens and the ablation.
      kept: 1 on edges of the circuit, with a third axis at every position where the reader reads.
      mask: real tokens.
      output_pos: the position of each prompt.
      needs: `needed` of this circuit, by layer; None computes all.
    """
    graph = Graph.of(model.config)
    run = Run(model, common, kept, mask)
    last = graph.n_layers - 1

    def of_layer(number: Array | int) -> Needs | None:
        return None if needs is None else Needs(needs.parts[number], needs.readers[number])

    rows = common.source[None]
    if last:
        rows = jnp.concatenate([rows, *FirstLayer(run).sources(of_layer(0))])
    # two rows for the ablated stream of a layer, as attention and as the MLP read it; with them a product is what the
    # readers read
    rows = jnp.concatenate([jnp.zeros((2, *rows.shape[1:]), rows.dtype), rows])
    between = max(0, last - 1)
    for chunk in chunks(between, max(_CHUNK, math.isqrt(between))):
        layers = np.asarray(chunk, np.int32) + 1
        # room for a chunk more: a layer reads all rows there are
        rows = jnp.pad(rows, ((0, len(layers) * graph.layer_sources), (0, 0), (0, 0), (0, 0)))
        some = jnp.ones(len(layers), bool) if needs is None else needs.parts[layers].any(1)
        # those that are computed, in their order, and then the others, which the loop does not come to
        order = jnp.asarray(layers)[jnp.argsort(~some, stable=True)]

        def body(i, rows, *, order=order):
            layer = MiddleLayer(run, order[i], rows)
            rows, start = layer.rows, 2 + layer.first_source
            for part in layer.sources(of_layer(order[i])):
                rows = jax.lax.dynamic_update_slice_in_dim(rows, part, start, 0)
                start += len(part)
            return rows

        n = len(layers) if needs is None else some.sum(dtype=jnp.int32)
        rows = jax.lax.fori_loop(0, n, body, rows)
    layer = LastLayer(run, last, rows, output_pos)
    written = jnp.concatenate([layer.rows_at_output[2:], *layer.sources(of_layer(last))])[:, :, 0]
    at_output = kept[:, -1:] if kept.ndim == 2 else kept[:, -1, output_pos]
    x = at_answer(common.last, output_pos, 1)
    return x + jnp.einsum("sb,sbd->bd", jnp.broadcast_to(at_output, written.shape[:2]), written)[:, None]
