"""The order in which edges are visited, and which readers still matter.

Everything is read off the names of a graph, so it holds for whatever sources and readers it has.
"""

import functools

import numpy as np

from mi_jax.circuits.graph import Graph


@functools.cache
def feeds(graph: Graph) -> np.ndarray:
    """True where a source computes from a reader, `[reader source]`.

    A head computes from its query and from the key and value of its group, an MLP or an expert from its layer's `m`.
    """
    out = np.zeros((graph.n_readers, graph.n_sources), bool)
    readers = {name: r for r, name in enumerate(graph.readers)}
    for s, source in enumerate(graph.sources[1:], 1):
        layer, _, number = source[1:].partition(".")
        if source[0] == "m":
            out[readers[f"m{layer}"], s] = True
            continue
        group = int(number[1:]) * graph.n_kv_heads // graph.n_heads
        for reader in (f"a{layer}.{number}<q>", f"a{layer}.h{group}<k>", f"a{layer}.h{group}<v>"):
            out[readers[reader], s] = True
    return out


def useful_readers(graph: Graph, circuit: np.ndarray) -> np.ndarray:
    """Readers from which some path through the circuit leads to the logits, `[reader]`.

    What the other readers read changes nothing, whatever it is. `Graph.prune` also drops what no path from the input
    reaches; that is more, since a head whose value is corrupted still passes on where it looks.
    """
    fed, useful = feeds(graph), np.zeros(graph.n_readers, bool)
    useful[-1] = True
    while True:
        writing = np.asarray((circuit & useful[None, :]).any(1))
        more = useful | (fed & writing[None, :]).any(1)
        if (more == useful).all():
            return useful
        useful = more


def changed_parts(
    graph: Graph, circuit: np.ndarray, useful: np.ndarray, reader: int, *, shared: bool
) -> np.ndarray:
    """Which parts of a layer compute something else, and matter, when a reader reads something else: `[layer 2]`.

    The two parts are the attention and the MLP; a part that the reader itself belongs to is not counted.

    Args:
      useful: `useful_readers` of the circuit.
      shared: a head that changes changes all of its layer.
    """
    fed, out = feeds(graph), np.zeros((graph.n_layers, 2), bool)
    layers, parts = reader_layers(graph), np.asarray(["<" not in name for name in graph.readers])
    changed = fed[reader].copy()
    heads = np.asarray([name[0] == "a" for name in graph.sources])
    written = np.asarray([-1, *(_layer(name) for name in graph.sources[1:])])
    if shared and "<" in graph.readers[reader]:
        changed |= heads & (written == layers[reader])
    for layer in range(layers[reader], graph.n_layers):
        for part in range(2):
            hit = (circuit & changed[:, None]).any(0) & useful & (layers == layer) & (parts == part)
            out[layer, part] = hit.any()
            changed |= fed[hit].any(0)
            if shared and part == 0 and hit.any():
                changed |= heads & (written == layer)
    return out


@functools.cache
def reader_layers(graph: Graph) -> np.ndarray:
    """The layer in which every reader reads; the number of layers for the logits. `[reader]`."""
    return np.asarray([graph.n_layers if name == "logits" else _layer(name) for name in graph.readers])


def reverse_topological(graph: Graph) -> np.ndarray:
    """All edges as rows (source, reader), those next to the logits first, `[edge 2]`.

    This is the order of Conmy et al. (2023) as they published it: readers from the logits back, in a layer the MLP,
    then values, keys and queries, each from the last head to the first; the sources of a reader from the last layer
    back, in a layer the MLP, then the heads from the first to the last.
    """
    sources = sorted(
        range(1, graph.n_sources), key=lambda s: (-_layer(graph.sources[s]), graph.sources[s][0] != "m", s)
    )
    rows = [(s, r) for r in reversed(range(graph.n_readers)) for s in (*sources, 0) if graph.edges[s, r]]
    return np.asarray(rows, np.int32)


def _layer(name: str) -> int:
    return int(name[1:].partition(".")[0].partition("<")[0])
