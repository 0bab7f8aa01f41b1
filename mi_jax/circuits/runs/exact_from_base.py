"""Exact scores of edges in a circuit: one edge added to it or taken away, by masked runs that resume the circuit's."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import head_logits
from mi_jax.circuits.runs.resume import masked_run, resumed_stream
from mi_jax.data.task import Task
from mi_jax.models.decoder import Decoder


def exact_from_base(
    model: Decoder,
    task: Task,
    patch: Float[Array, "source batch pos d_model"],
    base: Bool[np.ndarray, "source reader *pos"],
    among: Bool[np.ndarray, "source reader *pos"],
    batch_size: int,
) -> Float[np.ndarray, "source reader *pos"]:
    """Of each edge in `among`, `m(base with it) − m(base without it)`; 0 elsewhere."""
    graph = Graph.of(model.config)
    places = np.argwhere(among)
    layers = graph.reader_layers[places[:, 1]]
    batches = [_batches(places[layers == layer], batch_size) for layer in range(graph.n_layers + 1)]
    numbers = np.repeat(np.arange(graph.n_layers + 1, dtype=np.int32), [len(batch) for batch in batches])
    room = 1 << (len(numbers) - 1).bit_length() if len(numbers) else 0
    stacked = np.concatenate([*batches, np.zeros((room - len(numbers), batch_size, among.ndim), np.int32)])
    edges = graph.edges.reshape(graph.edges.shape + (1,) * (base.ndim - 2))
    corrupted = jnp.asarray(edges & ~base, patch.dtype)
    # what only fills up is read by the logits alone
    filled = np.pad(numbers, (0, room - len(numbers)), constant_values=graph.n_layers)
    found = np.asarray(_toggled(model, task, patch, corrupted, jnp.asarray(filled), jnp.asarray(stacked)))
    scores = np.zeros(base.shape, found.dtype)
    for layer in range(graph.n_layers + 1):
        place = places[layers == layer]
        difference = found[: len(numbers)][numbers == layer].reshape(-1)[: len(place)]
        scores[*place.T] = np.where(base[*place.T], difference, -difference)
    return scores


def _batches(places: np.ndarray, size: int) -> np.ndarray:
    """`[batch edge axis]`, the last filled up with repetitions."""
    filled = np.concatenate([places, np.repeat(places[-1:], -len(places) % size, 0)])
    return filled.reshape(-1, size, places.shape[1]).astype(np.int32)


@eqx.filter_jit
def _toggled(
    model: Decoder,
    task: Task,
    patch: Array,
    corrupted: Float[Array, "source reader *pos"],
    layers: Int[Array, " batch"],
    places: Int[Array, "batch edge axis"],
) -> Float[Array, "batch edge"]:
    """What the metric of the circuit loses with one edge the other way round, whose reader is in that layer."""
    run = masked_run(model, task.clean, corrupted, patch, task.mask)

    def metric(layer, edges):
        stream = resumed_stream(model, run, layer, edges, patch, task.mask, task.position)
        return task.metric(head_logits(model, stream)).mean()

    def batch(row):
        layer, places = row
        toggled = jax.vmap(lambda place: corrupted.at[tuple(place)].set(1 - corrupted[tuple(place)]))(places)
        # the circuit itself among them, so that an edge that changes nothing scores 0 whatever the rounding
        found = jax.vmap(metric, in_axes=(None, 0))(layer, jnp.concatenate([corrupted[None], toggled]))
        return found[0] - found[1:]

    return jax.lax.map(batch, (layers, places))
