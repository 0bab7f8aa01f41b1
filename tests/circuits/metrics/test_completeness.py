"""Completeness and minimality by their definitions, knockout by knockout, and the correction of p-values."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.completeness import completeness, minimality, paired_p_values, parts, random_knockouts
from mi_jax.circuits.metrics.faithfulness import faithfulness
from mi_jax.circuits.metrics.multiple import holm
from mi_jax.circuits.metrics.single import circuit_metrics
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model, task

TOLERANCE = 1e-4
GRAPH = Graph.of(model().config)
TASK = task()
KEY = jax.random.key(0)


@functools.cache
def circuit():
    return GRAPH.edges & (np.random.default_rng(3).random(GRAPH.edges.shape) < 0.7)


def f(*masks):
    return faithfulness(model(), TASK, list(masks))


def test_parts_of_a_circuit():
    mask = GRAPH.mask(["input->m0", "m0->logits", "m0->m1"])
    names, owned = parts(GRAPH, mask, "edge")
    assert names == ["input->m0", "m0->m1", "m0->logits"]
    assert [GRAPH.names(part) for part in owned] == [[name] for name in names]
    names, owned = parts(GRAPH, mask, "node")
    assert names == ["m0"]
    assert (owned[0] == (GRAPH.edges & (np.array(GRAPH.sources) == "m0")[:, None])).all()
    with pytest.raises(InputError, match="no edge to knock out"):
        parts(GRAPH, np.zeros_like(mask), "edge")
    with pytest.raises(InputError, match="one of \\('edge', 'node'\\), got 'head'"):
        parts(GRAPH, mask, "head")


def test_knockouts_have_every_size_equally_often():
    drawn = random_knockouts(5, 4000, seed=0)
    assert set(drawn.sum(1)) == {1, 2, 3, 4}
    counts = np.bincount(drawn.sum(1))[1:]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert scipy.stats.chisquare(drawn.sum(0)).pvalue > 1e-3


def test_completeness_by_its_definition():
    found = completeness(model(), TASK, circuit(), key=KEY, knockouts=3, null_circuits=2)
    _, owned = parts(GRAPH, circuit(), "edge")
    out = [owned[k].any(0) for k in random_knockouts(len(owned), 3, seed=0)]
    np.testing.assert_allclose(found.circuit, f(*(circuit() & ~k for k in out)), atol=TOLERANCE)
    np.testing.assert_allclose(found.model, f(*(GRAPH.edges & ~k for k in out)), atol=TOLERANCE)
    gaps = np.abs(found.circuit - found.model)
    assert found.incompleteness.value == pytest.approx(gaps.mean(), abs=TOLERANCE)
    assert found.worst == pytest.approx(gaps.max())
    assert found.incompleteness.ci_low < found.incompleteness.value < found.incompleteness.ci_high
    assert found.kl.value > 1e-3
    assert found.incompleteness_null.largest > found.incompleteness_null.smallest


def test_the_whole_graph_is_complete():
    found = completeness(model(), TASK, GRAPH.edges, key=KEY, level="node", knockouts=3, null_circuits=1)
    assert found.worst < TOLERANCE
    assert found.kl.value == pytest.approx(0, abs=1e-6)
    assert np.ptp(found.circuit) > 1e-2


def test_minimality_by_its_definition():
    """The effect of each edge is the largest over knockouts, and an edge that leads nowhere has none."""
    mask = GRAPH.prune(circuit())
    dangling = GRAPH.index("input->a1.h0<q>")
    mask[:, GRAPH.readers.index("a1.h0<q>")] = False
    mask[GRAPH.sources.index("a1.h0")] = False
    mask[dangling] = True
    found = minimality(model(), TASK, mask, knockouts=1)
    names, owned = parts(GRAPH, mask, "edge")
    assert found.names == tuple(names)
    (knocked,) = random_knockouts(len(names), 1, seed=0)
    rest = mask & ~owned[knocked].any(0)
    whole, less = f(mask, rest)
    alone = f(*(mask & ~part for part in owned))
    after = f(*(rest & ~part for part in owned))
    np.testing.assert_allclose(found.alone, whole - alone, atol=TOLERANCE)
    np.testing.assert_allclose(found.effect, np.maximum(abs(whole - alone), abs(less - after)), atol=TOLERANCE)
    useless = names.index("input->a1.h0<q>")
    assert found.effect[useless] < 1e-6
    assert found.p_value[useless] == 1
    assert "input->a1.h0<q>" in found.redundant()
    assert found.effect.max() > 0.05


def test_p_values_of_paired_changes():
    change = np.random.default_rng(0).normal(size=(3, 2, 9)) + 0.3
    np.testing.assert_allclose(paired_p_values(change), scipy.stats.ttest_1samp(change, 0, axis=-1).pvalue)
    np.testing.assert_array_equal(paired_p_values(np.zeros((2, 4))), [1, 1])


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])


def test_holm_errs_as_often_as_it_says():
    rng = np.random.default_rng(0)
    wrong = np.mean([(holm(rng.random(20)) < 0.1).any() for _ in range(4000)])
    assert wrong == pytest.approx(1 - (1 - 0.1 / 20) ** 20, abs=4 * np.sqrt(0.09 / 4000))


def test_sufficiency_and_necessity_by_their_definitions():
    found = circuit_metrics(model(), TASK, circuit(), key=KEY, null_circuits=2)
    own, complement = f(circuit(), GRAPH.edges & ~circuit())
    assert found.sufficiency.found.value == pytest.approx(own, abs=TOLERANCE)
    assert found.necessity.found.value == pytest.approx(1 - complement, abs=TOLERANCE)
    assert found.n_edges == circuit().sum()
    whole = circuit_metrics(model(), TASK, GRAPH.edges, key=KEY, null_circuits=2)
    for name, value in {"sufficiency": 1, "necessity": 1, "agreement": 1, "interchange": 1, "kl": 0}.items():
        compared = getattr(whole, name)
        assert compared.found.value == pytest.approx(value, abs=TOLERANCE)
        # a random circuit of all edges is all edges
        assert compared.null.mean == pytest.approx(value, abs=TOLERANCE)
    assert set(whole.kl.flat("kl")) == {"kl", "kl_ci_low", "kl_ci_high", "kl_null", "kl_null_layers"}
