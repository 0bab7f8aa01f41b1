"""From scores to a circuit of a given size: the best edges, or the best that stay connected to the logits."""

import heapq
from typing import Literal

import numpy as np

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.order import feeds
from mi_jax.core.errors import InputError

Rule = Literal["top", "greedy"]


def select_edges(
    graph: Graph, scores: np.ndarray, n: int, *, rule: Rule = "top", absolute: bool = True, prune: bool = False
) -> np.ndarray:
    """A mask of n edges chosen by score, of the shape of the scores.

    Args:
      scores: `[source reader]`, or `[source reader pos]` with the rule "top".
      rule: "top" takes the edges with the largest scores. "greedy" takes the best edge into the logits, and from then
        on the best among those into the logits and into what was taken before (EAP-IG, Hanna et al. 2024), so that
        every edge leads to the logits; it stops early where no edge is left.
      absolute: by absolute score; False takes what supports the metric most.
      prune: drop edges on no path from the input to the logits afterwards, so that fewer than n can be left.

    Raises:
      InputError: scores of another graph, a size that the graph does not have, or an unknown rule.
    """
    ranks = _ranks(graph, scores, absolute)
    total = int(np.isfinite(ranks).sum()) if scores.ndim == 2 else graph.n_edges * scores.shape[2]
    if not 0 <= n <= total:
        raise InputError(f"the graph has {total} edges with a score; n is between 0 and that, got {n}")
    if rule not in ("top", "greedy"):
        raise InputError(f"rule must be 'top' or 'greedy', got {rule!r}")
    if scores.ndim == 3 and (rule == "greedy" or prune):
        raise InputError("edges with a position axis are chosen with rule='top' and without pruning")
    chosen = _greedy(graph, ranks, n) if rule == "greedy" else _top(ranks, n)
    return graph.prune(chosen) if prune else chosen


def circuit_of_size(
    graph: Graph, scores: np.ndarray, n: int, *, rule: Rule = "top", absolute: bool = True
) -> np.ndarray:
    """The largest pruned circuit of best-scored edges with at most n edges.

    Choosing n edges and then pruning can leave few of them. Here more are chosen, as long as no more than n are left.
    """
    low, high = 0, graph.n_edges
    while low < high:
        middle = (low + high + 1) // 2
        size = select_edges(graph, scores, middle, rule=rule, absolute=absolute, prune=True).sum()
        low, high = (middle, high) if size <= n else (low, middle - 1)
    return select_edges(graph, scores, low, rule=rule, absolute=absolute, prune=True)


def _ranks(graph: Graph, scores: np.ndarray, absolute: bool) -> np.ndarray:
    """What edges are compared by; −∞ where there is none."""
    if scores.shape[:2] != graph.edges.shape or scores.ndim > 3:
        raise InputError(f"scores of this graph have shape {graph.edges.shape} [source reader], got {scores.shape}")
    exists = graph.edges if scores.ndim == 2 else np.broadcast_to(graph.edges[:, :, None], scores.shape)
    ranks = np.abs(scores) if absolute else scores
    if np.isnan(ranks[exists]).any():
        raise InputError("some edges have the score NaN; a method that divides by a vanishing effect gives that")
    return np.where(exists, ranks, -np.inf)


def _top(ranks: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(ranks.size, bool)
    mask[np.argsort(-ranks, axis=None, kind="stable")[:n]] = True
    return mask.reshape(ranks.shape)


def _greedy(graph: Graph, ranks: np.ndarray, n: int) -> np.ndarray:
    mask, fed = np.zeros_like(graph.edges), feeds(graph)
    opened = np.zeros(graph.n_readers, bool)
    heap: list[tuple[float, int, int]] = []

    def open_readers(readers: np.ndarray) -> None:
        for r in readers[~opened[readers]]:
            opened[r] = True
            for s in np.flatnonzero(graph.edges[:, r]):
                heapq.heappush(heap, (-float(ranks[s, r]), int(s), int(r)))

    open_readers(np.asarray([graph.n_readers - 1]))
    for _ in range(n):
        if not heap:
            break
        _, s, r = heapq.heappop(heap)
        mask[s, r] = True
        open_readers(np.flatnonzero(fed[:, s]))
    return mask
