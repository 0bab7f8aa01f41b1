"""Random circuits have the sizes they should, in every pair of layers, and are otherwise uniform."""

import numpy as np
import pytest
import scipy.stats

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.controls import layer_pairs, layer_profile, matched_edges, path_circuit, random_circuits
from mi_jax.core.errors import InputError
from tests.models.tiny_families import FAMILIES

GRAPH = Graph(n_layers=2, n_heads=2, n_kv_heads=1, has_mlp=True)
LIKE = GRAPH.edges & (np.random.default_rng(0).random(GRAPH.edges.shape) < 0.4)


def _layer(name, last):
    return -1 if name == "input" else last if name == "logits" else int(name[1])


def test_pairs_of_layers_by_their_names():
    pairs = layer_pairs(GRAPH)
    named = {}
    for s, r in np.argwhere(GRAPH.edges):
        named.setdefault((_layer(GRAPH.sources[s], 2), _layer(GRAPH.readers[r], 2)), set()).add(pairs[s, r])
    assert all(len(numbers) == 1 for numbers in named.values())
    assert len(set.union(*named.values())) == len(named) == 3 + 3 + 2


def test_matched_circuits_have_the_profile():
    for seed in range(5):
        drawn = matched_edges(GRAPH, LIKE, seed=seed)
        assert not (drawn & ~GRAPH.edges).any()
        np.testing.assert_array_equal(layer_profile(GRAPH, drawn), layer_profile(GRAPH, LIKE))
        # one nested family a seed
        more = matched_edges(GRAPH, LIKE | GRAPH.mask(["input->logits", "input->m0"]), seed=seed)
        assert not (drawn & ~more).any()


def test_matched_circuits_are_uniform_within_a_pair_of_layers():
    draws = sum(matched_edges(GRAPH, LIKE, seed=s).astype(int) for s in range(3000))
    pair = layer_pairs(GRAPH)[GRAPH.index("input->a0.h0<q>")]
    counts = draws[GRAPH.edges & (layer_pairs(GRAPH) == pair)]
    taken = layer_profile(GRAPH, LIKE)[pair]
    assert 0 < taken < len(counts)
    assert counts.sum() == 3000 * taken
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_families_have_a_circuit_for_every_mask():
    for kind in ("size", "layers"):
        families = random_circuits(GRAPH, [LIKE, GRAPH.edges], 3, kind=kind)
        assert [[m.sum() for m in f] for f in families] == [[LIKE.sum(), GRAPH.n_edges]] * 3
        assert (families[0][0] != families[1][0]).any()
    (one,) = random_circuits(GRAPH, [GRAPH.mask(["input->m0"])], 1, prune="connected")
    assert not one[0].any()
    with pytest.raises(InputError, match=r"matched by one of .*, got 'heads'"):
        random_circuits(GRAPH, [LIKE], 1, kind="heads")


@pytest.mark.parametrize("name", ["llama", "gptj", "mixture"])
def test_paths_are_drawn_step_by_step(name):
    """How often an edge is on a path, against its probability by dynamic programming over the names of the graph."""
    graph = Graph.of(FAMILIES[name])
    visited = {"input": 1.0}
    expected = np.zeros(graph.edges.shape)
    for s, source in enumerate(graph.sources):
        readers = np.flatnonzero(graph.edges[s])
        for r in readers:
            expected[s, r] = visited[source] / len(readers)
            # those that compute from this reader
            users = [u for u in graph.sources[1:] if r in graph.reader_rows(u)]
            for user in users:
                visited[user] = visited.get(user, 0.0) + expected[s, r] / len(users)
    n = 800
    found = sum(path_circuit(graph, 1, seed=seed).astype(float) for seed in range(n)) / n
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(found - expected) <= 4.5 * error + 1e-12).all()


def test_a_circuit_of_paths_has_enough_edges_and_each_leads_somewhere():
    graph = Graph.of(FAMILIES["llama"])
    half = path_circuit(graph, graph.n_edges // 2, seed=0)
    assert graph.n_edges // 2 <= half.sum() < graph.n_edges // 2 + 8
    np.testing.assert_array_equal(half, path_circuit(graph, graph.n_edges // 2, seed=0))
    more = path_circuit(graph, 3, seed=1, beyond=half)
    assert 3 <= (more & ~half).sum() < 3 + 8
    np.testing.assert_array_equal(path_circuit(graph, graph.n_edges, seed=0), graph.edges)
    for s, r in np.argwhere(half):
        assert s == 0 or half[:, graph.reader_rows(graph.sources[s])].any()
        users = [u for u in range(1, graph.n_sources) if r in graph.reader_rows(graph.sources[u])]
        assert r == graph.n_readers - 1 or half[users].any()
    with pytest.raises(InputError, match="random paths can bring from 0 to 0 edges"):
        path_circuit(graph, 1, seed=0, beyond=graph.edges)
