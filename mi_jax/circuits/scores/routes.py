"""Information-flow routes (Ferrando & Voita 2024): how much of what a reader reads each source accounts for.

`proximity(s, r) = max(0, ‖v_r‖₁ − ‖v_r − z_s‖₁)`, over the sum of the proximities of all sources that r reads. Only the
clean run is looked at: neither a corrupt run nor the metric enters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.circuits.scores.gradients import Pairs
from mi_jax.circuits.scores.readers import Readers, joined
from mi_jax.core.precision import widened
from mi_jax.models.decoder import Decoder


def information_flow(
    model: Decoder, pairs: Pairs, *, steps: int, positions: bool
) -> Float[Array, "source reader *pos"]:
    """Importances, averaged over the real positions of every prompt; with `positions`, their parts."""
    graph, task = Graph.of(model.config), pairs.task
    sources = widened(source_outputs(model, task.clean, task.mask))
    names = ("resid_pre", *(("mlp.in",) if graph.has_mlp else ()), "resid_post")
    _, streams = model(task.clean, task.mask, capture=names, output=False)
    edges = jnp.asarray(graph.edges).astype(sources.dtype)
    width = graph.layer_readers
    weight = task.mask.astype(sources.dtype)
    weight = weight / weight.sum(1, keepdims=True) * pairs.weight[:, None].astype(sources.dtype)

    def importance(row):
        stream, exists = row
        stream = widened(stream)
        near = jnp.abs(stream).sum(-1)[None] - jnp.abs(stream[None] - sources).sum(-1)
        near = jnp.maximum(near, 0) * exists[:, None, None]
        total = near.sum(0, keepdims=True)
        share = near / jnp.where(total > 0, total, jnp.ones_like(total))
        return (share * weight[None]).sum(1)

    layers = edges[:, :-1].reshape(graph.n_sources, graph.n_layers, width)
    attention = jax.lax.map(importance, (streams["resid_pre"], layers[:, :, 0].T))
    n_readers = graph.n_heads + 2 * graph.n_kv_heads
    attention = jnp.repeat(attention[:, None], n_readers, 1)
    mlp = None
    if graph.has_mlp:
        mlp = jax.lax.map(importance, (streams["mlp.in"], layers[:, :, -1].T))
    logits = importance((streams["resid_post"][-1], edges[:, -1]))
    scores = jnp.moveaxis(joined(Readers(attention, mlp, logits), 0), 0, 1)
    return scores if positions else scores.sum(-1)
