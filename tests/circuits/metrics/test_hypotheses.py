"""The tests of hypotheses: exact p-values by hand, error rates under the null, and what they say of plain circuits."""

import jax
import numpy as np
import pytest
import scipy.stats

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.controls import path_circuit
from mi_jax.circuits.metrics.faithfulness import random_edges
from mi_jax.circuits.metrics.hypotheses import (
    equivalence_test,
    independence_test,
    minimality_test,
    non_equivalence_test,
    partial_necessity_test,
    sufficiency_test,
)
from mi_jax.circuits.metrics.hypothesis_runs import hypothesis_tests
from mi_jax.circuits.runs.circuits import circuit_runs
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model
from tests.circuits.wide_task import task

KEY = jax.random.key(0)
GRAPH = Graph.of(model().config)
SEEDS = 1500


def within(rate, expected, n=SEEDS):
    """A fraction of n draws agrees with its probability to four standard errors."""
    return abs(rate - expected) < 4 * np.sqrt(max(expected * (1 - expected), 1e-4) / n)


def exact_size(n, p, rejects):
    """The probability that a test of a binomial count rejects."""
    return sum(scipy.stats.binom.pmf(k, n, p) for k in range(n + 1) if rejects(k))


def test_sufficiency_by_hand():
    random = np.arange(1.0, 21)
    assert sufficiency_test(0.5, random).p_value == pytest.approx(0.9**20)
    assert sufficiency_test(0.5, random).statistic == 1
    # beats 19 of 20: P(19 or 20 of 20)
    assert sufficiency_test(1.5, random).p_value == pytest.approx(0.9**20 + 20 * 0.9**19 * 0.1)
    assert sufficiency_test(99.0, random).p_value == pytest.approx(1)
    assert partial_necessity_test(99.0, random).p_value == pytest.approx(0.9**20)
    assert partial_necessity_test(0.5, random).p_value == pytest.approx(1)
    # equal to all of them: half the wins, which is no evidence
    assert sufficiency_test(1.0, np.ones(20)).statistic == 0.5
    assert sufficiency_test(1.0, np.ones(20)).p_value > 0.999


@pytest.mark.parametrize("test", [sufficiency_test, partial_necessity_test])
def test_sufficiency_and_necessity_err_as_often_as_they_say(test):
    """A circuit that stands exactly where the null ends: better than 90 % of random circuits."""
    rng = np.random.default_rng(0)
    edge = 0.1 if test is sufficiency_test else 0.9
    p = np.array([test(edge, rng.random(200)).p_value for _ in range(SEEDS)])
    for alpha in (0.05, 0.2):
        size = exact_size(200, 0.9, lambda k, a=alpha: scipy.stats.binom.sf(k - 1, 200, 0.9) < a)
        assert size <= alpha
        assert within((p < alpha).mean(), size)


def test_non_equivalence_by_hand():
    """Counts the sign of every prompt, not the size of the mean difference."""
    difference = np.r_[100.0, -np.ones(9)]
    found = non_equivalence_test(difference, epsilon=0.1)
    assert found.statistic == 0.1
    tail = sum(scipy.stats.binom.pmf(k, 10, 0.6) for k in (0, 1, 9, 10))
    assert found.p_value == pytest.approx(tail)
    assert non_equivalence_test(np.zeros(7)).p_value == 1
    assert equivalence_test(np.zeros(400)).rejects
    assert not non_equivalence_test(np.zeros(400)).rejects
    assert not equivalence_test(np.ones(400)).rejects
    assert non_equivalence_test(np.ones(400)).rejects


@pytest.mark.parametrize(("probability", "n"), [(0.6, 300), (0.4, 300)])
def test_equivalence_errs_as_often_as_it_says(probability, n):
    """At the border of the null both tests reject with nearly, and at most, their level."""
    rng = np.random.default_rng(1)
    draws = np.where(rng.random((SEEDS, n)) < probability, 1.0, -1.0)
    for test in (non_equivalence_test, equivalence_test):
        rate = np.mean([test(d).p_value < 0.1 for d in draws])
        size = exact_size(n, probability, lambda k, t=test: t(np.r_[np.ones(k), -np.ones(n - k)]).p_value < 0.1)
        assert 0.05 < size <= 0.1
        assert within(rate, size)


def test_independence_has_uniform_p_values_under_the_null():
    rng = np.random.default_rng(2)
    keys = jax.random.split(KEY, 200)
    p = np.array(
        [
            independence_test(rng.normal(size=15), 100 * rng.exponential(size=15), key=k, permutations=99).p_value
            for k in keys
        ]
    )
    assert p.min() >= 1 / 100
    # p-values are multiples of 1/100, each as likely as any other
    assert scipy.stats.kstest(p - rng.random(p.size) / 100, "uniform").pvalue > 1e-3


def test_independence_finds_what_correlation_does_not():
    x = np.linspace(-1, 1, 40)
    found = independence_test(x, 1e3 * x**2, key=KEY, permutations=199)
    assert abs(np.corrcoef(x, x**2)[0, 1]) < 1e-9
    assert found.p_value == 1 / 200
    # scales do not matter: every variable has its own width
    assert found.statistic == pytest.approx(independence_test(x, x**2, key=KEY, permutations=1).statistic)
    assert independence_test(x, np.ones(40), key=KEY, permutations=19).p_value == 1


def test_hsic_by_its_definition():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 9))

    def kernel(x):
        pairs = [abs(x[i] - x[j]) for i in range(9) for j in range(i)]
        return np.array([[np.exp(-0.5 * ((u - v) / np.median(pairs)) ** 2) for v in x] for u in x])

    h = np.eye(9) - 1 / 9
    expected = np.trace(kernel(a) @ h @ kernel(b) @ h) / 64
    assert independence_test(a, b, key=KEY, permutations=1).statistic == pytest.approx(expected)


def test_minimality_errs_as_often_as_it_says():
    """All edges at the border of the null, tested against the same random edges: at most α to reject any."""
    rng = np.random.default_rng(4)
    names = tuple(f"e{i}" for i in range(10))
    rejected = [
        minimality_test(names, np.full(10, 0.9), rng.random(100), alpha=0.1).overall.rejects for _ in range(SEEDS)
    ]
    independent = [
        minimality_test(names[:1], np.full(1, 0.9), rng.random(100), alpha=0.1).overall.rejects for _ in range(SEEDS)
    ]
    size = exact_size(100, 0.9, lambda k: scipy.stats.binom.cdf(k, 100, 0.9) < 0.1)
    assert np.mean(rejected) <= 0.1
    assert within(np.mean(independent), size)
    found = minimality_test(("weak", "strong"), np.array([0.01, 2.0]), rng.random(100))
    assert found.superfluous == ["weak"]
    np.testing.assert_allclose(found.quantiles[1], 1)
    assert found.p_values[1] == 1


@pytest.mark.parametrize(("draw", "drawn"), [("paths", path_circuit), ("edges", random_edges)])
def test_of_a_circuit(draw, drawn):
    """All edges but one that does nothing: close to the model, and without it nothing is left."""
    circuit = GRAPH.edges.copy()
    circuit[GRAPH.index("a1.h1->m1")] = False
    found = hypothesis_tests(model(), task(), circuit, key=KEY, draw=draw, random=5, max_edges=4, permutations=19)
    assert len(found.tests) == 6
    assert len({t.name for t in found.tests}) == 6
    assert all(0 <= t.p_value <= 1 for t in found.tests)
    assert len(found.minimality.names) == 4
    assert set(found.minimality.names) <= set(GRAPH.names(circuit))
    complement, n = GRAPH.edges & ~circuit, int(circuit.sum())
    random = np.stack([drawn(GRAPH, n, seed=s) for s in range(5)])
    masks = np.concatenate([circuit[None], complement[None], random, GRAPH.edges[None] & ~random])
    runs = circuit_runs(model(), task(), masks)
    far = np.abs(runs.metric.astype(np.float64) - runs.reference_metric).mean(1)
    assert found.sufficiency == sufficiency_test(float(far[0]), far[2:7])
    assert found.partial_necessity == partial_necessity_test(float(far[1]), far[7:])
    difference = (runs.metric - runs.reference_metric)[0].astype(np.float64)
    assert found.non_equivalence.statistic == non_equivalence_test(difference).statistic
    expected = independence_test(runs.metric[1], runs.reference_metric[1], key=KEY, permutations=19)
    assert found.independence.statistic == pytest.approx(expected.statistic, rel=1e-3)
    with pytest.raises(InputError, match="edges in the circuit and outside"):
        hypothesis_tests(model(), task(), GRAPH.edges, key=KEY)
    with pytest.raises(InputError, match="four or more; this task has 2"):
        hypothesis_tests(model(), task()[:2], circuit, key=KEY)
    with pytest.raises(InputError, match="draw is one of paths, edges"):
        hypothesis_tests(model(), task(), circuit, key=KEY, draw="nodes")


def test_minimality_names_an_edge_that_leads_nowhere():
    """Random paths reach the logits, so an edge that does not is worse than what they bring; single edges do not."""
    names = ("input->m0", "m0->logits", "input->logits", "input->a0.h0<v>")
    options = {"key": KEY, "random": 8, "quantile": 0.5, "permutations": 1}
    found = hypothesis_tests(model(), task(), GRAPH.mask(names), **options).minimality
    assert found.superfluous == ["input->a0.h0<v>"]
    assert found.overall.rejects
    assert found.overall.p_value == pytest.approx(4 * 0.5**8)
    single = hypothesis_tests(model(), task(), GRAPH.mask(names), draw="edges", **options).minimality
    assert not single.overall.rejects
