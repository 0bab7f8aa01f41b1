"""Paths through a circuit: what the input reaches, what leads to the logits, and which edges change nothing.

Circuits are boolean masks `[source reader]`, or `[source reader pos]` where an edge can be there at some positions of
its reader alone. What a head writes at one position depends on what its query, and its layer's MLP, read there, and on
what its key and value read at any position.
"""

import typing
from typing import Any

import numpy as np
from jaxtyping import Bool

if typing.TYPE_CHECKING:
    from mi_jax.circuits.graph.graph import Graph


def prune(graph: "Graph", mask: np.ndarray, *, ablation: Any = "resample") -> np.ndarray:
    """Drops the edges that change no run of the circuit, so that its faithfulness stays what it was.

    These are the edges into readers from which no path of the circuit leads to the logits. With the ablation
    "resample" also those out of sources that no path from the input reaches, through queries, keys or values: they
    write what they write in the corrupt run. With any other ablation such a source writes something that neither run
    has, and its edges count. Where a norm follows a bias of the heads nothing is dropped: every reader sees what
    becomes of the bias, whatever its edges.

    Raises:
      InputError: a mask of another graph.
    """
    mask = mask & graph.edges_like(mask)
    if graph.normed_bias:
        return mask
    by_position = mask.reshape(*graph.edges.shape, -1)
    kept = by_position & useful_readers(graph, by_position)[None]
    if from_input(ablation):
        kept = kept & reached_sources(graph, by_position)[:, None]
    return kept.reshape(mask.shape)


def from_input(ablation: Any) -> bool:
    """Whether a source that no path from the input reaches writes just what its ablated edges carry."""
    return isinstance(ablation, str) and ablation == "resample"


def layers_on_paths(graph: "Graph", mask: np.ndarray, *, ablation: Any) -> Bool[np.ndarray, " layer"]:
    """The layers that have a source with an edge that `prune` keeps; all where it can drop none."""
    if graph.normed_bias:
        return np.ones(graph.n_layers, bool)
    writes = np.any(prune(graph, mask, ablation=ablation).reshape(graph.n_sources, -1), axis=1)
    return writes[1:].reshape(graph.n_layers, graph.layer_sources).any(1)


def useful_readers(graph: "Graph", mask: Bool[np.ndarray, "source reader pos"]) -> Bool[np.ndarray, "reader pos"]:
    """Readers from which some path of the circuit leads to the logits; what the others read changes nothing."""
    everywhere = _read_everywhere(graph)
    useful = np.zeros(mask.shape[1:], bool)
    useful[-1] = True
    for s in range(graph.n_sources - 1, 0, -1):
        writes = (mask[s] & useful).any(0)
        if writes.any():
            inputs = graph.computes_from[s]
            useful[inputs & everywhere] = True
            useful[inputs & ~everywhere] |= writes
    return useful


def reached_sources(graph: "Graph", mask: Bool[np.ndarray, "source reader pos"]) -> Bool[np.ndarray, "source pos"]:
    """Sources to which some path of the circuit leads from the input."""
    everywhere = _read_everywhere(graph)
    reached = np.zeros((graph.n_sources, mask.shape[2]), bool)
    reached[0] = True
    for s in range(1, graph.n_sources):
        inputs = np.flatnonzero(graph.computes_from[s])
        into = np.any(mask[:s, inputs] & reached[:s, None], axis=0)
        reached[s] = into[~everywhere[inputs]].any(0) | into[everywhere[inputs]].any()
    return reached


def _read_everywhere(graph: "Graph") -> Bool[np.ndarray, " reader"]:
    """Keys and values, which heads at other positions see too."""
    return np.array([name.endswith(("<k>", "<v>")) for name in graph.readers])


def reverse_topological(graph: "Graph") -> np.ndarray:
    """All edges as rows (source, reader), those next to the logits first, `[edge 2]`.

    This is the order of Conmy et al. (2023) as they published it: readers from the logits back, in a layer the MLP,
    then values, keys and queries, each from the last head to the first; the sources of a reader from the last layer
    back, in a layer the MLP, then the heads from the first to the last.
    """
    layer = np.r_[-1, np.repeat(np.arange(graph.n_layers), graph.layer_sources)]
    is_mlp = np.array([name[0] == "m" for name in graph.sources])
    sources = np.lexsort((np.arange(graph.n_sources), ~is_mlp, -layer))
    rows = [(s, r) for r in reversed(range(graph.n_readers)) for s in sources if graph.edges[s, r]]
    return np.asarray(rows, np.int32)
