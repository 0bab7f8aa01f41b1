"""Agreement against sets, and nulls against what chance must give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.circuits.graph import Graph
from mi_jax.validation import Agreement, agreement, layer_matched_null, random_null

GRAPH = Graph(n_layers=2, n_heads=3, n_kv_heads=3, has_mlp=True)
PLACES = np.argwhere(GRAPH.edges)


def circuit(chosen) -> np.ndarray:
    mask = np.zeros_like(GRAPH.edges)
    for i in chosen:
        mask[tuple(PLACES[i])] = True
    return mask


subsets = st.sets(st.integers(0, len(PLACES) - 1), max_size=12)


@given(subsets, subsets)
@settings(deadline=None)
def test_precision_recall_and_f1_are_those_of_sets(found, true):
    got = agreement(circuit(found), circuit(true))
    common = len(found & true)
    assert (got.common, got.found, got.true) == (common, len(found), len(true))
    assert got.precision == (common / len(found) if found else 0)
    assert got.recall == (common / len(true) if true else 0)
    if got.precision + got.recall:
        assert got.f1 == pytest.approx(2 * got.precision * got.recall / (got.precision + got.recall))


def test_a_sum_counts_the_edges_of_all():
    total = Agreement(3, 4, 5) + Agreement(1, 4, 3)
    assert total == Agreement(4, 8, 8)
    assert total.f1 == 0.5


def test_different_graphs_are_refused():
    with pytest.raises(ValueError, match="not the same graph"):
        agreement(np.zeros((2, 3), bool), GRAPH.edges)


def test_the_random_null_is_chance():
    found, true = circuit(range(10)), circuit(range(5, 25))
    null = random_null(GRAPH, [found], [true], seeds=range(1500))
    # with n of N edges drawn, n · T / N of the T true ones are expected
    expected = 2 * (10 * 20 / len(PLACES)) / 30
    assert null.mean == pytest.approx(expected, rel=0.05)
    assert null.low <= null.mean <= null.high


def test_the_layer_matched_null_knows_the_layers():
    true = GRAPH.mask(["input->m0", "m0->m1", "m1->logits", "m0->logits"])
    # between these stages there is one edge each: to know the layers is to know the circuit
    assert layer_matched_null(GRAPH, [true], [true], seeds=range(20)).mean == 1.0
    assert random_null(GRAPH, [true], [true], seeds=range(20)).mean < 0.5
    heads = GRAPH.mask(["input->a0.h0<v>", "a0.h0->logits"])
    # three values and three heads to choose from: a third of each
    matched = layer_matched_null(GRAPH, [heads], [heads], seeds=range(2000)).mean
    assert matched == pytest.approx((1 / 9 + 1 / 3) / 2, abs=0.15)
    assert matched < 1.0
