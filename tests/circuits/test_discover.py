"""`discover`: sizes, searches, other prompts, progress, and bad input."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

from mi_jax.circuits.discover import discover
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.graph.selection import circuit_of_size
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.core.errors import InputError
from mi_jax.models import init_decoder
from tests.circuits.tiny_task import CONFIG, model, task

TASK = task()
GRAPH = Graph.of(CONFIG)
MODEL = model()
EXACT = exact_edges(MODEL, TASK)


def test_a_size_gives_the_best_edges_that_are_connected():
    parts = []
    circuit = discover(MODEL, TASK, scores=EXACT, n_edges=20, progress=lambda *part: parts.append(part))
    np.testing.assert_array_equal(circuit.mask, circuit_of_size(GRAPH, EXACT, 20))
    assert len(circuit) == circuit.mask.sum() == len(circuit.edges) == 20
    assert parts == [(1, 2), (2, 2)]
    names, values = zip(*circuit.top(5), strict=True)
    assert all(EXACT[GRAPH.index(name)] == value for name, value in zip(names, values, strict=True))
    assert np.abs(values).min() >= np.sort(np.abs(EXACT[circuit.mask]))[-5]
    assert list(np.abs(values)) == sorted(np.abs(values), reverse=True)


def test_a_circuit_is_measured_on_other_prompts_with_its_ablation():
    circuit = discover(MODEL, TASK, scores=EXACT, n_edges=30, ablation="zero")
    other = TASK[:1]
    expected = faithfulness(MODEL, other, [circuit.mask], ablation="zero")
    np.testing.assert_allclose(circuit.faithfulness_on(MODEL, other), expected[0])
    wider = init_decoder(dataclasses.replace(CONFIG, n_heads=4), key=jax.random.key(0))
    with pytest.raises(InputError, match="this circuit is of another model"):
        circuit.faithfulness_on(wider, other)


def test_token_edges_are_found_and_run():
    circuit = discover(MODEL, TASK, method="exact", positions=True, n_edges=40)
    assert len(circuit) == 40
    assert circuit.mask.shape == (*GRAPH.edges.shape, 4)
    assert all("@" in name for name in circuit.edges)
    np.testing.assert_array_equal(GRAPH.mask(circuit.edges, 4), circuit.mask)
    assert circuit.faithfulness == pytest.approx(faithfulness(MODEL, TASK, [circuit.mask])[0])
    with pytest.raises(InputError, match="'acdc' finds no circuits of token edges"):
        discover(MODEL, TASK, method="acdc", positions=True)


def test_a_circuit_that_is_the_whole_graph_is_said_to_be():
    # the edges upside down: the last to come is the one that matters most
    with pytest.warns(UserWarning, match="no circuit by 'eap-ig' smaller than the whole graph"):
        circuit = discover(MODEL, TASK, scores=1 / (1e-3 + np.abs(EXACT)), target=1.0)
    assert (circuit.mask == GRAPH.edges).all()


def test_progress_ends_where_the_search_does():
    parts = []
    circuit = discover(MODEL, TASK, scores=EXACT, target=0.5, progress=lambda *part: parts.append(part))
    total = parts[0][1]
    assert parts == [(i, total) for i in range(1, total + 1)]
    assert abs(1 - circuit.faithfulness) <= 0.5 + 1e-6


def test_acdc_decides_on_the_edges_itself():
    circuit = discover(MODEL, TASK, method="acdc", threshold=0.02)
    assert circuit.method == "acdc"
    assert (circuit.mask == GRAPH.prune(circuit.mask)).all()
    assert (circuit.scores[circuit.mask] >= 0.02).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "circuit"}, "no method 'circuit'; there are eap, .*acdc"),
        ({"n_edges": 0}, "n_edges is between 1 and that, got 0"),
        ({"target": 1.5}, "target is a faithfulness above 0 and at most 1"),
        ({"method": "eap", "threshold": 0.1}, "method 'eap' has no option threshold"),
        ({"method": "acdc", "n_edges": 5}, "ACDC has a threshold, not a size"),
        ({"method": "ugs"}, "'ugs' draws gates at random: give key="),
    ],
)
def test_bad_input_is_named(options, match):
    with pytest.raises(InputError, match=match):
        discover(MODEL, TASK, **options)


def test_a_metric_that_is_constant_is_named_before_anything_is_scored():
    same = eqx.tree_at(lambda t: t.corrupt, TASK, TASK.clean)
    with pytest.raises(InputError, match="faithfulness is undefined"):
        discover(MODEL, same)
