"""Random circuits that a found circuit has to beat: of equal size, or of equal size in every pair of layers.

Edges into late layers and out of the input matter more than others, so a circuit can look good by nothing but the
layers of its edges. The layer-matched control takes that away. Single edges drawn at random mostly lead nowhere, so
that even a poor circuit is better; circuits of random paths from the input to the logits (`path_circuit`) do not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import Prune, pruned, random_edges
from mi_jax.core.errors import InputError

Mask = Bool[np.ndarray, "source reader"]
KINDS = ("size", "layers")
# paths that are drawn together
_AT_ONCE = 128


def layer_pairs(graph: Graph) -> Int[np.ndarray, "source reader"]:
    """A number for each pair (layer of the source, layer of the reader); input and logits are layers of their own."""
    source = np.r_[0, 1 + np.arange(graph.n_sources - 1) // graph.layer_sources]
    reader = np.r_[np.arange(graph.n_readers - 1) // graph.layer_readers, graph.n_layers]
    return source[:, None] * (graph.n_layers + 1) + reader[None, :]


def layer_profile(graph: Graph, mask: Mask) -> Int[np.ndarray, " pair"]:
    """How many edges the mask has in each pair of layers."""
    n = (graph.n_layers + 1) ** 2
    return np.bincount(layer_pairs(graph)[mask & graph.edges], minlength=n)


def matched_edges(graph: Graph, like: Mask, *, seed: int) -> Mask:
    """Random edges, as many in every pair of layers as `like` has there. One order a seed: nested where `like` is."""
    pairs = layer_pairs(graph)[graph.edges]
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(pairs.size), pairs))
    first = np.searchsorted(pairs[order], np.arange(pairs.max() + 1))
    rank = np.empty(pairs.size, int)
    rank[order] = np.arange(pairs.size) - first[pairs[order]]
    out = np.zeros_like(graph.edges)
    out[graph.edges] = rank < layer_profile(graph, like)[pairs]
    return out


def random_circuits(
    graph: Graph,
    like: Sequence[Mask],
    n: int,
    *,
    kind: str = "layers",
    seed: int = 0,
    prune: Prune = "none",
    ablation: Any = "resample",
) -> list[list[Mask]]:
    """n families of random circuits, each with one circuit for every mask in `like`.

    Args:
      kind: "size" draws from all edges, "layers" keeps the numbers of edges in every pair of layers.
      prune: how dangling edges are deleted after the draw; the found circuits should have been pruned alike.
      ablation: what the edges outside carry, which pruning asks for.

    Raises:
      InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"random circuits are matched by one of {KINDS}, got {kind!r}")

    def draw(mask: np.ndarray, s: int) -> np.ndarray:
        if kind == "layers":
            return matched_edges(graph, mask, seed=s)
        return random_edges(graph, int((mask & graph.edges).sum()), seed=s)

    return [[pruned(draw(mask, seed + i), graph, prune, ablation=ablation) for mask in like] for i in range(n)]


def path_circuit(graph: Graph, n: int, *, seed: int, beyond: Mask | None = None) -> Mask:
    """The edges of random paths from the input to the logits, path after path until there are n or more (Shi 2024).

    A path goes from each source to one of the readers of the graph after it, all alike, and from there to what computes
    from that reader (to one of its heads or experts, all alike, where these share it).

    Args:
      beyond: edges that are not counted: at least n others are found.

    Raises:
      InputError: fewer than n edges are left.
    """
    counted = graph.edges if beyond is None else graph.edges & ~beyond
    if not 0 <= n <= counted.sum():
        raise InputError(f"random paths can bring from 0 to {int(counted.sum())} edges here; n={n} were asked for")
    rng, mask = np.random.default_rng(seed), np.zeros_like(graph.edges)
    while (missing := n - int((mask & counted).sum())) > 0:
        source, reader, path = _paths(graph, rng)
        new = counted[source, reader] & ~mask[source, reader]
        _, first = np.unique(source[new] * graph.n_readers + reader[new], return_index=True)
        brought = np.cumsum(np.bincount(path[new][first], minlength=_AT_ONCE))
        last = int(np.searchsorted(brought, missing))
        mask[source[path <= last], reader[path <= last]] = True
    return mask


def _paths(graph: Graph, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, readers and path numbers of the edges of some random paths, in the order of the paths."""
    fed, at, path = graph.own_readers.T, np.zeros(_AT_ONCE, int), np.arange(_AT_ONCE)
    found = []
    while len(path):
        to = _one_of(graph.edges[at], rng)
        found.append((at, to, path))
        on = to < graph.n_readers - 1
        at, path = _one_of(fed[to[on]], rng), path[on]
    source, reader, path = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(path, kind="stable")
    return source[order], reader[order], path[order]


def _one_of(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For every row one of the columns where it is True."""
    ranks = np.cumsum(rows, 1)
    drawn = rng.integers(0, ranks[:, -1]) if len(rows) else np.zeros(0, int)
    return (ranks > drawn[:, None]).argmax(1)
