"""Runs of circuits against the masked forward one by one, whatever the chunks and however many there are."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.circuits import circuit_runs
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.circuits.runs.program import run_circuits
from mi_jax.circuits.runs.sources import source_outputs
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model
from tests.circuits.wide_task import task

TOLERANCE = 1e-5
GRAPH = Graph.of(model().config)
TASK = task()
CIRCUITS = GRAPH.edges[None] & (np.random.default_rng(0).random((5, *GRAPH.edges.shape)) < 0.6)


@pytest.fixture(scope="module")
def logits():
    """Of each circuit, then of the whole model."""
    patch = source_outputs(model(), TASK.corrupt, TASK.mask)
    edges = [jnp.asarray(GRAPH.edges & ~c, jnp.float32) for c in (*CIRCUITS, GRAPH.edges)]
    runs = [masked_forward(model(), TASK.clean, e, patch, TASK.mask, output_pos=TASK.position) for e in edges]
    return [np.asarray(r) for r in runs]


def test_numbers_are_those_of_single_runs(logits):
    runs = circuit_runs(model(), TASK, CIRCUITS)
    assert len(runs) == 5
    p = [scipy.special.softmax(x[:, 0].astype(np.float64), -1) for x in logits]
    for i in range(5):
        np.testing.assert_allclose(runs.metric[i], TASK.metric(jnp.asarray(logits[i])), atol=TOLERANCE)
        np.testing.assert_allclose(runs.kl[i], scipy.special.rel_entr(p[-1], p[i]).sum(-1), atol=TOLERANCE)
        np.testing.assert_array_equal(runs.prediction[i], logits[i][:, 0].argmax(-1))
        np.testing.assert_array_equal(runs.reference_prediction[i], logits[-1][:, 0].argmax(-1))
    np.testing.assert_array_equal(runs.agreement, runs.prediction == logits[-1][:, 0].argmax(-1)[None])
    assert runs.kl.min() > 1e-4
    np.testing.assert_array_equal(runs[np.array([3, 1])].metric, runs.metric[[3, 1]])


def test_references_are_circuits_too(logits):
    runs = circuit_runs(model(), TASK, CIRCUITS, CIRCUITS[::-1])
    p = [scipy.special.softmax(x[:, 0].astype(np.float64), -1) for x in logits]
    for i in range(5):
        np.testing.assert_allclose(runs.kl[i], scipy.special.rel_entr(p[4 - i], p[i]).sum(-1), atol=TOLERANCE)
    np.testing.assert_allclose(runs.reference_metric, runs.metric[::-1], atol=TOLERANCE)
    np.testing.assert_allclose(runs.kl[2], 0, atol=1e-6)


def test_chunks_change_nothing_and_counts_compile_nothing():
    one = circuit_runs(model(), TASK, CIRCUITS)
    compiled = run_circuits._cached._cache_size()
    others = GRAPH.edges[None] & (np.random.default_rng(1).random((15, *GRAPH.edges.shape)) < 0.6)
    many = circuit_runs(model(), TASK, np.concatenate([CIRCUITS, others]))
    assert run_circuits._cached._cache_size() == compiled
    np.testing.assert_allclose(many.metric[:5], one.metric, atol=TOLERANCE)
    chunked = circuit_runs(model(), TASK, CIRCUITS, batch_size=2)
    np.testing.assert_allclose(chunked.metric, one.metric, atol=TOLERANCE)
    np.testing.assert_allclose(chunked.kl, one.kl, atol=TOLERANCE)


def test_equal_circuits_and_the_model_itself_are_not_run_again(logits):
    """They have the numbers that they would have had, in their places."""
    same = np.stack([CIRCUITS[1], GRAPH.edges, CIRCUITS[0], CIRCUITS[1], GRAPH.edges])
    runs, single = circuit_runs(model(), TASK, same), circuit_runs(model(), TASK, CIRCUITS)
    np.testing.assert_allclose(runs.metric[[0, 2, 3]], single.metric[[1, 0, 1]], atol=TOLERANCE)
    for i in (1, 4):
        np.testing.assert_allclose(runs.metric[i], TASK.metric(jnp.asarray(logits[-1])), atol=TOLERANCE)
        assert (runs.kl[i] == 0).all()
        assert runs.agreement[i].all()
    alone = circuit_runs(model(), TASK, [GRAPH.edges, GRAPH.edges])
    np.testing.assert_allclose(alone.metric, runs.metric[[1, 4]], atol=TOLERANCE)
    np.testing.assert_allclose(alone.kl, 0, atol=1e-6)


def test_bad_circuits_are_named():
    with pytest.raises(InputError, match="no circuit to run"):
        circuit_runs(model(), TASK, [])
    with pytest.raises(InputError, match=r"circuits must all be masks \(7, 11\)"):
        circuit_runs(model(), TASK, [np.zeros((3, 3), bool)])
    with pytest.raises(InputError, match="boolean masks, got float64"):
        circuit_runs(model(), TASK, [np.zeros(GRAPH.edges.shape)])
    with pytest.raises(InputError, match="go in pairs of one kind"):
        circuit_runs(model(), TASK, CIRCUITS, CIRCUITS[:2])
    with pytest.raises(InputError, match="batch_size is at least 1 circuit at once, or None; got 0"):
        circuit_runs(model(), TASK, CIRCUITS, batch_size=0)
