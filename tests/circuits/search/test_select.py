"""Choosing edges by score: against a brute-force search for the best edge, and what is left after pruning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import circuit_of_size, select_edges
from mi_jax.core.errors import InputError

GRAPHS = [Graph(2, 2, 1, True), Graph(3, 2, 2, False), Graph(2, 4, 2, True, parallel=True)]
SEEDS = st.tuples(st.sampled_from(GRAPHS), st.integers(0, 10_000), st.integers(0, 30))


def _scores(graph: Graph, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=graph.edges.shape)


def test_signed_and_absolute_scores_choose_different_edges():
    graph = GRAPHS[0]
    scores = np.where(graph.mask(["input->logits"]), -5.0, 0.0) + np.where(graph.mask(["m0->logits"]), 3.0, 0.0)
    assert graph.names(select_edges(graph, scores, 1)) == ["input->logits"]
    assert graph.names(select_edges(graph, scores, 1, absolute=False)) == ["m0->logits"]


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_greedy_takes_the_best_edge_into_what_is_connected(drawn):
    graph, seed, n = drawn
    scores, fed = _scores(graph, seed), graph.computes_from.T
    mask = np.zeros_like(graph.edges)
    for _ in range(n):
        open_readers = (fed & mask.any(1)[None, :]).any(1)
        open_readers[-1] = True
        ranks = np.where(graph.edges & ~mask & open_readers[None, :], np.abs(scores), -1.0)
        if ranks.max() > 0:
            mask[np.unravel_index(ranks.argmax(), ranks.shape)] = True
    assert (select_edges(graph, scores, n, rule="greedy") == mask).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_circuit_of_a_size_is_pruned_and_as_large_as_it_can_be(drawn):
    graph, seed, n = drawn
    scores = _scores(graph, seed)
    circuit = circuit_of_size(graph, scores, n)
    assert circuit.sum() <= n
    assert (graph.prune(circuit) == circuit).all()
    sizes = [graph.prune(select_edges(graph, scores, k)).sum() for k in range(graph.n_edges + 1)]
    assert circuit.sum() == max(size for size in sizes if size <= n)


def test_edges_at_positions_are_chosen_one_by_one():
    graph = GRAPHS[0]
    scores = np.zeros((*graph.edges.shape, 3))
    scores[0, -1, 2] = 1.0
    assert np.argwhere(select_edges(graph, scores, 1)).tolist() == [[0, graph.n_readers - 1, 2]]


def test_what_does_not_fit_is_named():
    graph = GRAPHS[0]
    with pytest.raises(InputError, match="between 0 and that, got 999"):
        select_edges(graph, _scores(graph, 0), 999)
    with pytest.raises(InputError, match="NaN"):
        select_edges(graph, np.full(graph.edges.shape, np.nan), 1)
    with pytest.raises(InputError, match="source reader"):
        select_edges(graph, np.zeros((2, 2)), 1)
