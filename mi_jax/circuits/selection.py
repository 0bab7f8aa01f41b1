"""Which edges make a circuit: the best-scored, random ones, and what pruning leaves of them."""

from typing import Literal

import numpy as np
from jaxtyping import Bool

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.search.order import feeds
from mi_jax.circuits.search.select import Rule, select_edges
from mi_jax.core.errors import InputError

Select = Literal["absolute", "signed"]
Prune = Literal["none", "connected", "mib"]


def top_edges(
    scores: np.ndarray, graph: Graph, n: int, *, select: Select = "absolute", rule: Rule = "top"
) -> Bool[np.ndarray, "..."]:
    """Mask of the n edges with the largest absolute, or signed, score; the first of equals in the order of edges.

    Args:
      rule: "greedy" takes only edges that lead to the logits, as MIB does for information-flow routes; see
        `select_edges`.

    Raises:
      InputError: scores of another graph, or that are NaN.
    """
    n = min(n, int(edges_like(graph, scores).sum()))
    return select_edges(graph, scores, n, rule=rule, absolute=select == "absolute")


def edges_like(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """The edges of the graph, at every position where the scores have a position axis.

    Raises:
      InputError: arrays of another graph.
    """
    if scores.ndim not in (2, 3) or scores.shape[:2] != graph.edges.shape:
        raise InputError(f"this graph has {graph.edges.shape} sources and readers; the array given is {scores.shape}")
    return graph.edges if scores.ndim == 2 else np.broadcast_to(graph.edges[:, :, None], scores.shape)


def random_edges(graph: Graph, n: int, *, seed: int) -> np.ndarray:
    """Mask of n edges drawn without regard to anything: the control of a circuit of that size."""
    places = np.argwhere(graph.edges)
    chosen = places[np.random.default_rng(seed).permutation(len(places))[:n]]
    mask = np.zeros(graph.edges.shape, bool)
    mask[chosen[:, 0], chosen[:, 1]] = True
    return mask


def pruned(mask: np.ndarray, graph: Graph, prune: Prune) -> np.ndarray:
    """The mask without its dangling edges.

    Args:
      prune: "connected" keeps what a path from input to logits uses, a head being reached through its values
        (`Graph.prune`). "mib" keeps a node that has edges in and edges out, of whatever kind, as EAP-IG does. "none".
    """
    if prune == "none":
        return mask
    if prune == "connected":
        return graph.prune(mask)
    if mask.ndim == 3:
        raise InputError("EAP-IG's pruning knows no positions; take prune='connected' or 'none' for token edges")
    fed = feeds(graph).T
    mask = mask & graph.edges
    while True:
        read, written = np.any(mask, axis=0), np.any(mask, axis=1)
        alive = written & np.r_[True, np.any(fed & read[None, :], axis=1)[1:]]
        useful = np.r_[np.any(fed & alive[:, None], axis=0)[:-1], True]
        kept = mask & alive[:, None] & useful[None, :]
        if (kept == mask).all():
            return kept
        mask = kept
