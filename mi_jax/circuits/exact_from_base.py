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
    base: Bool[np.ndarray, "source reader"],
    among: Bool[np.ndarray, "source reader"],
    batch_size: int,
) -> Float[np.ndarray, "source reader"]:
    """Of each edge in `among`, `m(base with it) − m(base without it)`; 0 elsewhere."""
    graph = Graph.of(model.config)
    readers = [range(c.start * graph.layer_readers, c.stop * graph.layer_readers) for c in chunks(graph.n_layers)]
    places = [np.argwhere(among[:, r.start : r.stop]) + [[0, r.start]] for r in (*readers, range(graph.n_readers)[-1:])]
    batches = [_batches(p, batch_size) for p in places]
    corrupted = jnp.asarray(graph.edges & ~base, patch.dtype)
    without, found = _toggled(model, task, patch, corrupted, [jnp.asarray(b) for b in batches])
    scores = np.zeros(graph.edges.shape, np.asarray(without).dtype)
    for place, metrics in zip(places, found, strict=True):
        s, r = place.T
        difference = float(without) - np.asarray(metrics).reshape(-1)[: len(place)]
        scores[s, r] = np.where(base[s, r], difference, -difference)
    return scores


def _batches(places: np.ndarray, size: int) -> np.ndarray:
    """`[batch edge 2]`: a power of two of batches, so that few numbers of edges compile anew; none for no edge."""
    n = -(-len(places) // size)
    room = (1 << (n - 1).bit_length()) * size if n else 0
    filled = np.concatenate([places, np.repeat(places[-1:], room - len(places), 0)])
    return filled.reshape(-1, size, 2).astype(np.int32)


@eqx.filter_jit
def _toggled(
    model: Decoder, task: Task, patch: Array, corrupted: Float[Array, "source reader"], batches: list[Array]
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
            s, r = place
            return metric(begin, corrupted.at[s, r].set(1 - corrupted[s, r]))

        return jax.vmap(one)

    found = [jax.lax.map(edge(i), b) if len(b) else b[:, :, 0] for i, b in enumerate(batches)]
    return metric(len(layers), corrupted), found
