"""Exact scores of edges in a circuit: one edge added to it or taken away, by masked runs.

A run starts from the stored state before the chunk of layers in which the reader of its edge stands.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.masked import advance, chunks, finish, start
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
    readers = [range(c.start * graph.layer_readers, c.stop * graph.layer_readers) for c in chunks(graph.n_layers)]
    readers.append(range(graph.n_readers)[-1:])
    first = np.eye(among.ndim, dtype=np.int64)[1]
    places = [np.argwhere(among[:, r.start : r.stop]) + r.start * first[None] for r in readers]
    batches = [_batches(p, batch_size) for p in places]
    edges = graph.edges.reshape(graph.edges.shape + (1,) * (base.ndim - 2))
    corrupted = jnp.asarray(edges & ~base, patch.dtype)
    without, found = _toggled(model, task, patch, corrupted, [jnp.asarray(b) for b in batches])
    scores = np.zeros(base.shape, np.asarray(without).dtype)
    for place, metrics in zip(places, found, strict=True):
        difference = float(without) - np.asarray(metrics).reshape(-1)[: len(place)]
        scores[*place.T] = np.where(base[*place.T], difference, -difference)
    return scores


def _batches(places: np.ndarray, size: int) -> np.ndarray:
    """`[batch edge axis]`: a power of two of batches, so that few numbers of edges compile anew; none for no edge."""
    n = -(-len(places) // size)
    room = (1 << (n - 1).bit_length()) * size if n else 0
    filled = np.concatenate([places, np.repeat(places[-1:], room - len(places), 0)])
    return filled.reshape(-1, size, places.shape[1]).astype(np.int32)


@eqx.filter_jit
def _toggled(
    model: Decoder, task: Task, patch: Array, corrupted: Float[Array, "source reader *pos"], batches: list[Array]
) -> tuple[Array, list[Array]]:
    """The metric of the circuit, and of it with one edge the other way round, by the chunk where that edge is read."""
    layers = chunks(model.config.n_layers)
    states = [start(model, task.clean, patch)]
    for chunk in layers:
        states.append(advance(model, states[-1], corrupted, patch, task.mask, chunk, remat=False))

    def metric(begin, edges):
        state = states[begin]
        for chunk in layers[begin:]:
            state = advance(model, state, edges, patch, task.mask, chunk, remat=False)
        return task.metric(finish(model, state, edges, task.position)).mean()

    def edge(begin):
        def one(place):
            at = tuple(place)
            return metric(begin, corrupted.at[at].set(1 - corrupted[at]))

        return jax.vmap(one)

    found = [jax.lax.map(edge(i), b) if len(b) else b[:, :, 0] for i, b in enumerate(batches)]
    return metric(len(layers), corrupted), found
