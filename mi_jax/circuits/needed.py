"""What need not be computed in the run of a circuit (`mi_jax.circuits.kept`)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.order import feeds

# circuits
_AT_ONCE = 64


class Needs(NamedTuple):
    """What is needed of layers.

    Attributes:
      parts: whether some head, and whether the MLP, is on a path to the logits.
      readers: of attention, that something is computed from and that have an edge from something that is computed; the
        others read the ablated stream.
    """

    parts: Bool[np.ndarray, "*circuit 2"] | Bool[Array, "*circuit 2"]
    readers: Bool[np.ndarray, "*circuit reader"] | Bool[Array, "*circuit reader"]


def needed(
    graph: Graph,
    circuits: Bool[np.ndarray, "circuit source reader *pos"],
    *,
    from_input: bool,
    dependent: bool,
) -> Needs:
    """What is needed of every layer in the run of every circuit.

    Args:
      from_input: the patch is itself a run of the model, so that a source that no path from the input reaches writes
        what the patch has, and need not be computed either.
      dependent: what a head writes depends on what all heads of its layer read (`depend_on_each_other`).
    """
    if len(circuits) > _AT_ONCE:
        # the arrays in here are several times the masks
        blocks = np.split(circuits, range(_AT_ONCE, len(circuits), _AT_ONCE))
        parts = [needed(graph, block, from_input=from_input, dependent=dependent) for block in blocks]
        return Needs(*(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2)))
    fed = feeds(graph)
    if dependent:
        by_layer = fed[:, 1:].reshape(graph.n_readers, graph.n_layers, graph.layer_sources).copy()
        by_layer[:, :, : graph.n_heads] = by_layer[:, :, : graph.n_heads].any(2, keepdims=True)
        fed = np.concatenate([fed[:, :1], by_layer.reshape(graph.n_readers, -1)], axis=1)
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
    parts = np.stack([layers[:, :, : graph.n_heads].any(2), layers[:, :, graph.n_heads :].any(2)], axis=2)
    changed = np.any(edges & alive[:, :, None], axis=1) & np.any(fed[None] & alive[:, None, :], axis=2)
    readers = changed[:, :-1].reshape(len(edges), graph.n_layers, graph.layer_readers)
    return Needs(parts, readers[:, :, : graph.layer_readers - graph.has_mlp])
