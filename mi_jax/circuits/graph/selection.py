"""Which edges make a circuit: the best-scored, random ones, and what pruning leaves of them."""

import heapq
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from mi_jax.circuits.graph.graph import Graph
from mi_jax.core.errors import InputError

Rule = Literal["top", "greedy"]
Select = Literal["absolute", "signed"]
Prune = Literal["none", "connected", "mib"]


def select_edges(
    graph: Graph, scores: np.ndarray, n: int, *, rule: Rule = "top", absolute: bool = True
) -> Bool[np.ndarray, "source reader *pos"]:
    """A mask of n edges chosen by score, of the shape of the scores; the first of equals in the order of edges.

    Args:
      scores: `[source reader]`, or `[source reader pos]` with the rule "top".
      rule: "top" takes the edges with the largest scores. "greedy" takes the best edge into the logits, and from then
        on the best among those into the logits and into what was taken before (EAP-IG, Hanna et al. 2024), so that
        every edge leads to the logits; it stops early where no edge is left.
      absolute: by absolute score; False takes what supports the metric most.

    Raises:
      InputError: scores of another graph or that are NaN, a size that the graph does not have, or an unknown rule.
    """
    ranks = _ranks(graph, scores, absolute)
    total = int(np.isfinite(ranks).sum()) if scores.ndim == 2 else graph.n_edges * scores.shape[2]
    if not 0 <= n <= total:
        raise InputError(f"the graph has {total} edges with a score; n is between 0 and that, got {n}")
    if rule not in ("top", "greedy"):
        raise InputError(f"rule must be 'top' or 'greedy', got {rule!r}")
    if scores.ndim == 3 and rule == "greedy":
        raise InputError("edges with a position axis are chosen with rule='top'")
    return _greedy(graph, ranks, n) if rule == "greedy" else _top(ranks, n)


def top_edges(
    scores: np.ndarray, graph: Graph, n: int, *, select: Select = "absolute", rule: Rule = "top"
) -> Bool[np.ndarray, "source reader *pos"]:
    """`select_edges`, with all edges where there are fewer than n."""
    n = min(n, int(graph.edges_like(scores).sum()))
    return select_edges(graph, scores, n, rule=rule, absolute=select == "absolute")


def circuit_of_size(
    graph: Graph, scores: np.ndarray, n: int, *, rule: Rule = "top", absolute: bool = True, ablation: Any = "resample"
) -> Bool[np.ndarray, "source reader *pos"]:
    """The largest pruned circuit of best-scored edges with at most n edges.

    Choosing n edges and then pruning can leave few of them. Here more are chosen, as long as no more than n are left.
    """

    def of(k: int) -> np.ndarray:
        return graph.prune(select_edges(graph, scores, k, rule=rule, absolute=absolute), ablation=ablation)

    return of(_largest(lambda k: of(k).sum() <= n, int(graph.edges_like(scores).sum())))


def random_edges(
    graph: Graph, n: int, *, seed: int, n_pos: int | None = None
) -> Bool[np.ndarray, "source reader *pos"]:
    """Mask of n edges drawn without regard to anything: the control of a circuit of that size.

    Args:
      n_pos: of prompts, for token edges.
    """
    mask = np.zeros((*graph.edges.shape, *(() if n_pos is None else (n_pos,))), bool)
    places = np.argwhere(graph.edges_like(mask))
    mask[tuple(places[np.random.default_rng(seed).permutation(len(places))[:n]].T)] = True
    return mask


def pruned(mask: np.ndarray, graph: Graph, prune: Prune, *, ablation: Any = "resample") -> np.ndarray:
    """The mask without its dangling edges.

    Args:
      prune: "connected" drops the edges that change no run (`Graph.prune`). "mib" keeps a node that has edges in and
        edges out, of whatever kind, as EAP-IG does. "none".
      ablation: what the edges outside carry, see `ablation_values`.
    """
    if prune == "none":
        return mask
    if prune == "connected":
        return graph.prune(mask, ablation=ablation)
    if mask.ndim == 3:
        raise InputError("EAP-IG's pruning knows no positions; take prune='connected' or 'none' for token edges")
    mask = mask & graph.edges
    while True:
        read, written = np.any(mask, axis=0), np.any(mask, axis=1)
        alive = written & np.r_[True, np.any(graph.own_readers & read[None, :], axis=1)[1:]]
        useful = np.r_[np.any(graph.own_readers & alive[:, None], axis=0)[:-1], True]
        kept = mask & alive[:, None] & useful[None, :]
        if (kept == mask).all():
            return kept
        mask = kept


def _largest(holds: Callable[[int], Any], high: int) -> int:
    """The largest number up to `high` for which it holds, that of a smaller one following from that of a larger."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _ranks(graph: Graph, scores: np.ndarray, absolute: bool) -> np.ndarray:
    """What edges are compared by; −∞ where there is none."""
    exists = graph.edges_like(scores)
    ranks = np.abs(scores) if absolute else scores
    if np.isnan(ranks[exists]).any():
        raise InputError("some edges have the score NaN; a method that divides by a vanishing effect gives that")
    return np.where(exists, ranks, -np.inf)


def _top(ranks: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(ranks.size, bool)
    mask[np.argsort(-ranks, axis=None, kind="stable")[:n]] = True
    return mask.reshape(ranks.shape)


def _greedy(graph: Graph, ranks: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros_like(graph.edges)
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
        open_readers(np.flatnonzero(graph.computes_from[s]))
    return mask
