"""Scores of nodes against masked runs, hooked runs and the completeness of the integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.masked import masked_forward, source_outputs
from mi_jax.circuits.scores.nodes import node_circuit, node_scores, top_nodes
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import CONFIG, model, task

GRAPH = Graph.of(CONFIG)


def _metric(edges: np.ndarray) -> float:
    t, m = task(), model()
    patch = source_outputs(m, t.corrupt, t.mask)
    logits = masked_forward(m, t.clean, jnp.asarray(edges, jnp.float32), patch, t.mask, output_pos=t.position)
    return float(t.metric(logits).mean())


def test_exact_node_scores_equal_runs_that_carry_the_corrupt_activation():
    m, t = model(), task()
    scores = node_scores(m, t, method="exact", batch_size=3)
    _, corrupt = m(t.corrupt, t.mask, capture=("attn.z", "mlp_out"))
    run = jax.jit(lambda taps: t.metric(m(t.clean, t.mask, taps=taps, output_pos=t.position)).mean())
    clean = float(run({}))
    for name, edit in {
        "a0.h1": mi.patch("attn.z", corrupt, layer=0, head=1),
        "a1.h0": mi.patch("attn.z", corrupt, layer=1, head=0),
        "m0": mi.patch("mlp_out", corrupt, layer=0),
    }.items():
        patched = float(run({edit.site: (edit,)}))
        assert scores[GRAPH.sources.index(name)] == pytest.approx(clean - patched, abs=1e-5), name


def test_nap_is_the_slope_of_the_metric():
    scores, h = node_scores(model(), task(), method="nap"), 3e-3
    for s in (0, 2, 3):
        row = np.where(np.arange(GRAPH.n_sources) == s, h, 0.0)[:, None] * GRAPH.edges
        assert -scores[s] == pytest.approx((_metric(row) - _metric(-row)) / (2 * h), abs=2e-3)


def test_integrated_scores_add_up_to_what_corrupting_everything_costs():
    lost = _metric(np.zeros(GRAPH.edges.shape)) - _metric(GRAPH.edges)
    assert abs(lost) > 0.01
    assert node_scores(model(), task(), steps=12).sum() == pytest.approx(lost, abs=1e-3)
    assert node_scores(model(), task(), method="nap").sum() != pytest.approx(lost, abs=1e-3)


def test_a_node_circuit_has_all_edges_between_its_nodes_and_no_other():
    everything = np.ones(GRAPH.n_sources, bool)
    assert (node_circuit(GRAPH, everything) == GRAPH.edges).all()
    one = np.array([name == "m0" for name in GRAPH.sources])
    assert GRAPH.names(node_circuit(GRAPH, one)) == ["input->m0", "input->logits", "m0->logits"]


def test_the_best_nodes_are_chosen_by_size_or_by_support():
    scores = np.array([9.0, -3.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    assert np.flatnonzero(top_nodes(GRAPH, scores, 2)).tolist() == [0, 1, 3]
    assert np.flatnonzero(top_nodes(GRAPH, scores, 2, absolute=False)).tolist() == [0, 2, 3]


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="at least 1, got 0"):
        node_scores(model(), task(), steps=0)
    with pytest.raises(InputError, match="7 sources"):
        node_circuit(GRAPH, np.ones(3, bool))
