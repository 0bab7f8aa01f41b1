"""Faithfulness: its ends, its curve, the choice of edges, and what `discover` returns."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import (
    FRACTIONS,
    Curve,
    Graph,
    curve,
    discover,
    edge_scores,
    faithfulness,
    random_curves,
    random_edges,
    top_edges,
)
from mi_jax.circuits.faithfulness import sizes
from tests.circuits.tiny_task import model, task

TOLERANCE = 1e-5
TASK = task()
GRAPH = Graph.of(model().config)


@pytest.fixture(scope="module")
def exact():
    return edge_scores(model(), TASK, method="exact")


def _metric(tokens):
    return float(TASK.logit_difference(mi.jit(model())(tokens, TASK.mask, output_pos=TASK.position)).mean())


def test_faithfulness_by_its_definition(exact):
    """The whole graph keeps the metric, none of it keeps nothing, and all but one edge loses that edge's effect."""
    edge = GRAPH.index("input->m0")
    but_one = GRAPH.edges.copy()
    but_one[edge] = False
    values = faithfulness(model(), TASK, [GRAPH.edges, np.zeros_like(GRAPH.edges), but_one])
    whole = _metric(TASK.clean) - _metric(TASK.corrupt)
    np.testing.assert_allclose(values, [1, 0, 1 + exact[edge] / whole], atol=1e-4)
    assert abs(exact[edge] / whole) > 1e-2


def test_faithfulness_is_undefined_where_nothing_changes():
    same = eqx.tree_at(lambda t: t.corrupt, TASK, TASK.clean)
    with pytest.raises(ValueError, match="task 'tiny': clean and corrupt prompts give the same metric"):
        faithfulness(model(), same, [GRAPH.edges])


def test_cmd_of_curves_drawn_by_hand():
    assert Curve((0.0, 1.0), (1, 2), (1.0, 1.0)).cmd == 0
    assert Curve((0.0, 1.0), (1, 2), (0.0, 1.0)).cmd == pytest.approx(0.5)
    # overshooting counts as much as falling short: triangles of 0.25·0.5/2 on either side, then nothing
    assert Curve((0.0, 0.25, 0.5, 1.0), (1, 2, 3, 4), (1.0, 1.5, 1.0, 1.0)).cmd == pytest.approx(0.125)
    assert Curve((0.0, 0.25, 0.5, 1.0), (1, 2, 3, 4), (1.0, 0.5, 1.0, 1.0)).cmd == pytest.approx(0.125)


def test_curves_end_in_the_whole_graph(exact):
    found = curve(model(), TASK, exact)
    assert found.fractions == FRACTIONS
    assert found.edges == sizes(GRAPH)
    assert found.edges[-1] == GRAPH.n_edges
    assert found.values[-1] == pytest.approx(1, abs=1e-4)
    circuits = [top_edges(exact, GRAPH, n) for n in found.edges]
    np.testing.assert_allclose(found.values, faithfulness(model(), TASK, circuits), atol=TOLERANCE)
    random = random_curves(model(), TASK, seeds=(0, 1))
    assert len(random) == 2
    assert random[0].edges == found.edges
    assert random[0].values != random[1].values
    assert [r.values[-1] for r in random] == pytest.approx([1, 1], abs=1e-4)
    assert found.cmd < np.mean([r.cmd for r in random])


@pytest.mark.parametrize("n", [0, 1, 7, GRAPH.n_edges, GRAPH.n_edges + 5])
def test_top_and_random_edges_have_the_size_asked_for(n):
    scores = np.random.default_rng(0).normal(size=GRAPH.edges.shape)
    top = top_edges(scores, GRAPH, n)
    assert top.sum() == min(n, GRAPH.n_edges)
    assert not (top & ~GRAPH.edges).any()
    if 0 < n < GRAPH.n_edges:
        assert np.abs(scores[top]).min() > np.abs(scores[GRAPH.edges & ~top]).max()
    drawn = random_edges(GRAPH, n, seed=3)
    assert drawn.sum() == min(n, GRAPH.n_edges)
    assert not (drawn & ~GRAPH.edges).any()
    np.testing.assert_array_equal(drawn, random_edges(GRAPH, n, seed=3))
    # one nested family a seed
    assert not (drawn & ~random_edges(GRAPH, n + 2, seed=3)).any()


def test_random_edges_are_uniform():
    counts = sum(random_edges(GRAPH, 10, seed=s).astype(int) for s in range(2000))[GRAPH.edges]
    expected = 2000 * 10 / GRAPH.n_edges
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_discover_returns_the_smallest_circuit_on_its_grid(exact):
    circuit = discover(model(), TASK, scores=exact, target=0.9)
    assert circuit.graph == GRAPH
    assert abs(1 - circuit.faithfulness) <= 0.1 + TOLERANCE
    np.testing.assert_allclose(faithfulness(model(), TASK, [circuit.mask]), circuit.faithfulness, atol=TOLERANCE)
    assert set(circuit.edges) == set(GRAPH.names(circuit.mask))
    smaller = [GRAPH.prune(top_edges(exact, GRAPH, n)) for n in range(1, GRAPH.n_edges)]
    smaller = [mask for mask in smaller if mask.sum() < circuit.mask.sum()]
    assert all(abs(1 - f) > 0.1 for f in faithfulness(model(), TASK, smaller))


def test_discover_always_has_an_answer():
    useless = np.where(GRAPH.edges, 1.0, 0.0)
    useless[GRAPH.index("input->logits")] = 1e-9
    circuit = discover(model(), TASK, scores=useless, target=1.0)
    assert circuit.faithfulness == pytest.approx(1, abs=1e-4)


def test_a_task_is_cut_into_rows():
    part = TASK[1:]
    assert len(part) == 1
    assert part.name == "tiny"
    logits = jnp.arange(13.0)[None, None, :]
    np.testing.assert_allclose(part.logit_difference(logits), part.answer - part.distractor)
    probability = np.exp(float(part.answer[0])) / np.exp(np.arange(13.0)).sum()
    np.testing.assert_allclose(part.answer_probability(logits), [probability], rtol=1e-5)
