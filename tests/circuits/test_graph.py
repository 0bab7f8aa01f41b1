"""Counts, names and pruning of the computational graph."""

import dataclasses

import numpy as np
import pytest

from mi_jax.circuits import Graph
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import ATTENTION_ONLY, CONFIG
from tests.models.tiny_families import FAMILIES

GRAPH = Graph.of(CONFIG)


def test_gpt2_small_has_the_published_number_of_edges():
    graph = Graph(12, 12, 12, True)
    assert (graph.n_sources, graph.n_readers, graph.n_edges) == (157, 445, 32491)
    assert len(graph.sources) == len(set(graph.sources)) == 157
    assert len(graph.readers) == len(set(graph.readers)) == 445


@pytest.mark.parametrize(
    "graph", [Graph(1, 1, 1, False), Graph(3, 4, 2, True), Graph(2, 6, 1, False), Graph(30, 9, 3, True)], ids=str
)
def test_counts_follow_from_the_shape(graph):
    expected, before = 0, 1
    for _ in range(graph.n_layers):
        expected += before * (graph.n_heads + 2 * graph.n_kv_heads)
        before += graph.n_heads
        if graph.has_mlp:
            expected += before
            before += 1
    assert graph.n_edges == expected + before
    assert graph.edges.shape == (len(graph.sources), len(graph.readers)) == (graph.n_sources, graph.n_readers)


def test_edges_go_forward_only():
    exists = {
        "input->a0.h0<q>": True,
        "input->logits": True,
        "a0.h1->m0": True,
        "m0->a1.h0<v>": True,
        "a1.h0->logits": True,
        "a0.h0->a0.h1<q>": False,
        "m0->m0": False,
        "m0->a0.h0<k>": False,
        "a1.h0->m0": False,
    }
    names = set(GRAPH.names(GRAPH.edges))
    assert {name: name in names for name in exists} == exists
    assert len(names) == GRAPH.n_edges
    # one key/value head for the two query heads
    assert "input->a0.h1<q>" in names
    assert "input->a0.h1<k>" not in names
    assert not any(name.startswith("m") for name in Graph.of(ATTENTION_ONLY).sources)


def test_names_round_trip():
    names = GRAPH.names(GRAPH.edges)
    np.testing.assert_array_equal(GRAPH.mask(names), GRAPH.edges)
    for name in names:
        assert GRAPH.names(GRAPH.mask([name])) == [name]
    for unknown in ("m0->a0.h0<q>", "input->a7.h0<q>", "nonsense", "input->a0.h1<v>"):
        with pytest.raises(ValueError, match=f"no edge '{unknown}'; edges look like"):
            GRAPH.index(unknown)


def pruned(*edges, graph=GRAPH):
    return set(graph.names(graph.prune(graph.mask(edges))))


def test_a_path_is_kept_and_what_leads_nowhere_is_not():
    path = {"input->a0.h0<v>", "a0.h0->m1", "m1->logits"}
    assert pruned(*path) == path
    assert pruned(*path, "input->m0", "a1.h1->logits", "m0->a1.h0<q>") == path
    assert pruned(*(path - {"m1->logits"})) == set()
    assert pruned(*(path - {"input->a0.h0<v>"})) == set()
    assert pruned("input->logits") == {"input->logits"}
    assert pruned() == set()


def test_a_head_that_is_reached_by_queries_or_keys_alone_is_alive():
    """It looks elsewhere than in the other run, over the values of the other run."""
    for letter in "qkv":
        looking = {f"input->a1.h0<{letter}>", "a1.h0->logits"}
        assert pruned(*looking, "m0->m1") == looking
    # what EAP-IG's own pruning keeps
    assert pruned("input->a0.h0<q>", "a0.h0->logits") == {"input->a0.h0<q>", "a0.h0->logits"}
    chain = {"input->a0.h0<v>", "a0.h0->a1.h0<q>", "a1.h0->logits"}
    assert pruned(*chain) == chain


def test_what_no_input_reaches_counts_where_ablated_edges_are_of_no_run():
    alone = GRAPH.mask(["m0->a1.h0<q>", "a1.h0->logits"])
    loose = alone | GRAPH.mask(["input->m1"])
    assert not GRAPH.prune(loose).any()
    np.testing.assert_array_equal(GRAPH.prune(loose, ablation="mean"), alone)
    np.testing.assert_array_equal(GRAPH.prune(loose, ablation=np.zeros(3)), alone)


def test_positions_count_where_a_reader_sees_one_alone():
    edges = ["input->a0.h0<q>@1", "input->a0.h0<k>@0", "a0.h0->m1@1", "m1->logits@1", "a0.h1->m1@0", "m1->logits@0"]
    mask = GRAPH.mask(edges, 3)
    # a key is read from all positions, and both heads share it
    np.testing.assert_array_equal(GRAPH.prune(mask), mask)
    by_query = GRAPH.mask(["input->a0.h0<q>@1", "a0.h0->logits@1", "a0.h0->logits@2"], 3)
    assert GRAPH.names(GRAPH.prune(by_query)) == ["input->a0.h0<q>@1", "a0.h0->logits@1"]
    np.testing.assert_array_equal(GRAPH.mask(GRAPH.names(mask), 3), mask)
    with pytest.raises(InputError, match="names a position, and this mask has positions 0 to 2"):
        GRAPH.mask(["input->logits@3"], 3)
    with pytest.raises(InputError, match="names a position, and this mask has no positions: give n_pos"):
        GRAPH.mask(["input->logits@0"])


def test_coupled_heads_depend_on_what_all_heads_of_their_layer_read():
    coupled = dataclasses.replace(GRAPH, coupled=True)
    path = ["input->a1.h0<q>", "a1.h1->logits"]
    assert pruned(*path) == set()
    assert set(coupled.names(coupled.prune(coupled.mask(path)))) == set(path)
    assert [Graph.of(FAMILIES[name]).coupled for name in ("llama", "gemma", "olmo2", "mixture")] == [False, *[True] * 3]


def test_grouped_heads_share_the_edges_of_their_key_value_head():
    both = {"input->a0.h0<v>", "a0.h0->logits", "a0.h1->logits"}
    assert pruned(*both) == both
    graph = Graph(1, 4, 2, False)
    assert pruned("input->a0.h1<v>", "a0.h1->logits", graph=graph) == set()
    first = {"input->a0.h0<v>", "a0.h1->logits"}
    assert pruned(*first, "a0.h2->logits", graph=graph) == first


def test_pruning_removes_cascades_keeps_the_whole_graph_and_is_idempotent():
    np.testing.assert_array_equal(GRAPH.prune(GRAPH.edges), GRAPH.edges)
    rng = np.random.default_rng(0)
    for density in (0.1, 0.3, 0.6):
        once = GRAPH.prune(GRAPH.edges & (rng.random(GRAPH.edges.shape) < density))
        np.testing.assert_array_equal(GRAPH.prune(once), once)


def test_a_shared_key_is_drawn_into_the_heads_that_are_there():
    grouped = Graph(n_layers=2, n_heads=4, n_kv_heads=2, has_mlp=False)
    mask = grouped.mask(["input->a1.h1<k>", "a1.h2->logits", "a1.h3->logits"])
    edges = grouped.to_json(mask, np.ones(mask.shape))["edges"]
    assert [(e["from"], e["to"]) for e in edges if e["input"] == "k"] == [("input", "a1.h2"), ("input", "a1.h3")]
    alone = grouped.mask(["input->a1.h0<v>"])
    assert [e["to"] for e in grouped.to_json(alone, np.ones(mask.shape))["edges"]] == ["a1.h0"]


def test_json_has_the_nodes_and_scores_of_the_edges():
    scores = np.arange(GRAPH.edges.size, dtype=float).reshape(GRAPH.edges.shape)
    mask = GRAPH.mask(["input->a0.h0<v>", "a0.h0->m1", "m1->logits"])
    found = GRAPH.to_json(mask, scores)
    assert [node["name"] for node in found["nodes"]] == ["input", "a0.h0", "m1", "logits"]
    assert [node["kind"] for node in found["nodes"]] == ["input", "head", "mlp", "logits"]
    assert [node["layer"] for node in found["nodes"]] == [-1, 0, 1, 2]
    assert [edge["input"] for edge in found["edges"]] == ["v", "mlp", "logits"]
    assert found["edges"][1]["score"] == scores[GRAPH.index("a0.h0->m1")]


def test_experts_are_sources_and_share_one_reader():
    graph = Graph(2, 2, 2, True, n_experts=3)
    assert graph.sources[3:6] == ("m0.e0", "m0.e1", "m0.e2")
    assert (graph.n_sources, graph.n_readers) == (11, 15)
    # the input reads by 15; a layer's heads by its MLP and all after, its experts by all after
    assert graph.n_edges == 15 + 2 * 9 + 3 * 8 + 2 * 2 + 3 * 1
    np.testing.assert_array_equal(graph.prune(graph.edges), graph.edges)
    path = graph.mask(["input->m0", "m0.e1->a1.h0<v>", "a1.h0->logits"])
    np.testing.assert_array_equal(graph.prune(path), path)
    assert not graph.prune(graph.mask(["input->a0.h0<v>", "m0.e1->a1.h0<v>", "a1.h0->logits"])).any()
    drawn = graph.to_json(path, np.ones(path.shape))
    assert [edge["to"] for edge in drawn["edges"]] == ["m0.e1", "a1.h0", "logits"]
    assert drawn["nodes"][1] == {"name": "m0.e1", "layer": 0, "kind": "expert"}
    with pytest.raises(InputError, match=r"no edge 'm0->logits'; edges look like .* or 'm1.e2->logits'"):
        graph.index("m0->logits")
