"""Rankings of edges against scikit-learn, and MIB's figure against curves worked out by hand."""

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import pruned, top_edges
from mi_jax.circuits.metrics.ranking import edge_ranking, mib_auroc
from mi_jax.core.errors import InputError

TOLERANCE = 1e-12
GRAPH = Graph(n_layers=2, n_heads=2, n_kv_heads=2, has_mlp=True)
KEY = jax.random.key(0)


def planted(noise, seed=0):
    rng = np.random.default_rng(seed)
    truth = (rng.random(GRAPH.edges.shape) < 0.3) & GRAPH.edges
    return truth + noise * rng.normal(size=truth.shape), truth


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_areas_are_those_of_scikit_learn(ties, absolute):
    scores, truth = planted(0.8)
    scores = np.round(scores, 0 if ties else 12)
    found = edge_ranking(scores, truth, GRAPH, key=KEY, absolute=absolute, resamples=20)
    flat, labels = scores[GRAPH.edges], truth[GRAPH.edges]
    flat = np.abs(flat) if absolute else flat
    assert (len(np.unique(flat)) < 10) == ties
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, flat), abs=TOLERANCE)
    assert found.average_precision.value == pytest.approx(average_precision_score(labels, flat), abs=TOLERANCE)
    assert found.average_precision_null == pytest.approx(labels.mean())
    assert (found.n_true, found.n_edges) == (labels.sum(), GRAPH.n_edges)


def test_ends_of_the_scale():
    _, truth = planted(0)
    best = edge_ranking(truth.astype(float), truth, GRAPH, key=KEY, resamples=10)
    assert (best.auroc.value, best.average_precision.value) == pytest.approx((1, 1))
    worst = edge_ranking(1.0 - truth, truth, GRAPH, key=KEY, resamples=10)
    assert worst.auroc.value == pytest.approx(0)
    blind = edge_ranking(np.ones(truth.shape), truth, GRAPH, key=KEY, resamples=10)
    assert blind.auroc.value == pytest.approx(0.5)
    assert blind.average_precision.value == pytest.approx(blind.average_precision_null)


def test_the_interval_has_the_spread_of_fresh_draws():
    """Its width is that of the 95 % range of AUROC over new edges, within the error of the bootstrap."""
    scores, truth = planted(0.8)
    interval = edge_ranking(scores, truth, GRAPH, key=KEY, absolute=False, resamples=400).auroc
    positive = truth[GRAPH.edges]
    rng = np.random.default_rng(1)
    fresh = [roc_auc_score(positive, positive + 0.8 * rng.normal(size=positive.size)) for _ in range(400)]
    low, high = np.percentile(fresh, [2.5, 97.5])
    assert interval.ci_low < interval.value < interval.ci_high
    assert (interval.ci_high - interval.ci_low) / (high - low) == pytest.approx(1, abs=0.35)


def test_mib_auroc_by_hand():
    """The chain input→m0→logits is the truth and ranked first: its three points are (0, 1), (.., 1), (1, 1)."""
    graph = Graph(n_layers=1, n_heads=1, n_kv_heads=1, has_mlp=True)
    assert graph.n_edges == 8
    truth = graph.mask(["input->m0", "m0->logits"])
    scores = np.zeros(truth.shape)
    scores[graph.index("m0->logits")], scores[graph.index("input->m0")] = 5, 4
    scores[graph.index("input->logits")], scores[graph.index("a0.h0->logits")] = 3, 2
    # sizes are 1 seven times over (it dangles, so nothing is left), 2 (0.2 · 8 rounded up), 4, 8. The fourth dangles,
    # so TPR and FPR are (0, 0), (1, 0), (1, 1/6), (1, 1)
    assert mib_auroc(scores, truth, graph) == pytest.approx(1)
    # a truth that only the last circuit holds: TPR 0, 1/2 at FPR (2 − 1)/6 …
    late = graph.mask(["m0->logits", "a0.h0->m0"])
    # (0, 0), (0.5, 1/6), (0.5, 2/6), (1, 1)
    by_hand = 0.25 * (1 / 6) + 0.5 * (1 / 6) + 0.75 * (4 / 6)
    assert mib_auroc(scores, late, graph) == pytest.approx(by_hand)


def test_bad_input_is_named():
    scores, truth = planted(1.0)
    with pytest.raises(InputError, match=r"this graph has \(7, 15\) sources and readers; scores have \(3, 3\)"):
        edge_ranking(np.zeros((3, 3)), np.zeros((3, 3), bool), GRAPH, key=KEY)
    with pytest.raises(InputError, match=r"0 of .* are true"):
        edge_ranking(scores, np.zeros_like(truth), GRAPH, key=KEY)
    with pytest.raises(InputError, match="edges that the graph does not have"):
        edge_ranking(scores, np.ones_like(truth), GRAPH, key=KEY)
    scores[GRAPH.index("input->logits")] = np.nan
    with pytest.raises(InputError, match=r"1 of .* edge scores are not finite"):
        edge_ranking(scores, truth, GRAPH, key=KEY)


def test_the_published_code_gives_the_same():
    """Figures from the packages EAP-IG and MIB-circuit-track, for scores and a truth that are formulas."""
    s, r = np.indices(GRAPH.edges.shape)
    scores = np.sin(17.0 * s + 29 * r + 1)
    truth = (np.cos(13.0 * s + 7 * r) > 0.5) & GRAPH.edges
    assert (GRAPH.n_edges, truth.sum()) == (46, 16)
    assert mib_auroc(scores, truth, GRAPH) == pytest.approx(0.5395833333333333, abs=TOLERANCE)
    chain = ["input->a0.h1<v>", "a0.h1->m0", "m0->a1.h1<q>", "input->a1.h1<k>", "a1.h1->logits", "a0.h1->logits"]
    for select, left in (("absolute", ["input->logits"]), ("signed", chain)):
        nine = top_edges(scores, GRAPH, 9, select=select)
        assert set(GRAPH.names(pruned(nine, GRAPH, "mib"))) == set(left)
