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
    graph: Graph, circuit: np.ndarray, useful: np.ndarray, reader: int, *, n_groups: int, shared: bool
) -> np.ndarray:
    """Which parts of layers compute something else, and matter, when a reader reads something else: `[layer part]`.

    The parts are the groups of heads, of which there are `n_groups` to a layer, and then the MLP. The part that the
    reader itself belongs to is not counted.

    Args:
      useful: `useful_readers` of the circuit.
      shared: a head that changes changes what all heads of its layer write.
    """
    fed, layers, parts = feeds(graph), reader_layers(graph), _parts(graph, n_groups)
    out, changed = np.zeros((graph.n_layers, n_groups + 1), bool), fed[reader].copy()
    first = 1 + layers[reader] * graph.layer_sources
    if shared and "<" in graph.readers[reader]:
        changed[first : first + graph.n_heads] = True
    for layer in range(layers[reader], graph.n_layers):
        for is_mlp in (False, True):
            here = (layers == layer) & ((parts == n_groups) == is_mlp) & useful
            hit = here & (circuit & changed[:, None]).any(0)
            out[layer, parts[hit]] = True
            changed |= fed[hit].any(0)
            begin = 1 + layer * graph.layer_sources
            if shared and hit.any() and not is_mlp:
                changed[begin : begin + graph.n_heads] = True
    return out


@functools.cache
def _parts(graph: Graph, n_groups: int) -> np.ndarray:
    """Of every reader its group of heads; the number of groups for the MLP and the logits."""
    out = np.full(graph.n_readers, n_groups)
    for r, name in enumerate(graph.readers):
        if "<" in name:
            among = graph.n_heads if name.endswith("<q>") else graph.n_kv_heads
            out[r] = int(name.partition("<")[0].partition(".h")[2]) * n_groups // among
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
