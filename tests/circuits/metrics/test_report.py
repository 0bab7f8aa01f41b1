"""`evaluate_circuit` on a tiny model: its parts are what their own functions give, and its JSON is complete."""

import json

import jax
import numpy as np
import pytest

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics import evaluate_circuit
from mi_jax.circuits.metrics.faithfulness import curve, faithfulness
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model
from tests.circuits.wide_task import task

TOLERANCE = 1e-4
KEY = jax.random.key(0)
GRAPH = Graph.of(model().config)
TASK = task()
FEW = {"null_circuits": 4, "knockouts": 4, "random": 6, "max_edges": 4}


def single_effects():
    """What corrupting each edge alone takes from the metric."""
    places = np.argwhere(GRAPH.edges)
    without = np.repeat(GRAPH.edges[None], len(places), 0)
    without[np.arange(len(places)), places[:, 0], places[:, 1]] = False
    scores = np.zeros(GRAPH.edges.shape)
    scores[GRAPH.edges] = 1 - faithfulness(model(), TASK, list(without))
    return scores


@pytest.fixture(scope="module")
def report():
    scores = single_effects()
    rng = np.random.default_rng(0)
    per_prompt = scores[None] + 0.05 * rng.normal(size=(len(TASK), *scores.shape)) * GRAPH.edges[None]
    groups = ["a", "a", "b", "b", "c", "c"]
    truth = np.abs(scores) > 0.3
    return evaluate_circuit(
        model(), TASK, scores, key=KEY, n_edges=30, truth=truth, per_prompt=per_prompt, groups=groups, **FEW
    )


def test_parts_are_those_of_their_own_functions(report):
    scores = single_effects()
    mib = {"prune": "mib", "floor": True}
    assert report.curves.cmd.found.value == pytest.approx(curve(model(), TASK, scores, **mib).cmd, abs=TOLERANCE)
    signed = curve(model(), TASK, scores, select="signed", **mib)
    assert report.curves.cpr.found.value == pytest.approx(signed.cpr, abs=TOLERANCE)
    assert report.curves.signed.cpr_from_zero == pytest.approx(signed.cpr_from_zero, abs=TOLERANCE)
    small = {0.001: 0, 0.005: 2, 0.01: 3}
    assert {f: report.curves.absolute.values[i] for f, i in small.items()} == pytest.approx(
        {f: found.found.value for f, found in report.curves.small.items()}, abs=TOLERANCE
    )
    (own,) = faithfulness(model(), TASK, [report.mask])
    assert report.metrics.sufficiency.found.value == pytest.approx(own, abs=TOLERANCE)
    assert report.mask.sum() <= 30
    assert report.ranking.auroc.value == 1
    assert report.stability["bootstrap"].jaccard.value > report.stability["bootstrap"].null.mean
    table = report.curves.table()
    assert [row["kept"] for row in table] == list(report.curves.absolute.kept)
    assert table[-1]["faithfulness"] == pytest.approx(1, abs=TOLERANCE)


def test_scores_that_say_what_edges_do_beat_random_circuits(report):
    assert report.curves.cmd.found.value < report.curves.cmd.null.mean
    assert report.curves.cpr.found.value > report.curves.cpr.null.mean


def test_json_is_flat_and_complete(report):
    out = report.to_json()
    assert json.loads(json.dumps(out)) == out
    assert all(isinstance(v, int | float) for v in out.values())
    for name in (
        "faithfulness_at_0_1_percent",
        "cmd",
        "cpr",
        "faithfulness",
        "necessity",
        "kl",
        "agreement",
        "incompleteness",
        "auroc",
    ):
        assert {name, f"{name}_null", f"{name}_ci_low", f"{name}_ci_high"} <= set(out)
    for name in ("stability_jaccard", "stability_bootstrap_jaccard", "stability_paraphrase_jaccard"):
        assert {name, f"{name}_null", f"{name}_ci_low", f"{name}_ci_high"} <= set(out)
    assert {"mib_auroc", "cmd_from_zero", "test_sufficiency_p_value", "test_minimality_rejects"} <= set(out)


def test_the_whole_graph_as_a_mask():
    whole = evaluate_circuit(model(), TASK, GRAPH.edges, key=KEY, **FEW)
    assert whole.curves is None
    assert whole.tests is None
    assert whole.to_json()["faithfulness"] == pytest.approx(1, abs=TOLERANCE)
    assert whole.to_json()["n_edges"] == GRAPH.n_edges


def test_bad_input_is_named():
    with pytest.raises(InputError, match="need edge scores; a mask"):
        evaluate_circuit(model(), TASK, GRAPH.edges, key=KEY, n_edges=3)
    with pytest.raises(InputError, match="no edges"):
        evaluate_circuit(model(), TASK, np.zeros_like(GRAPH.edges), key=KEY)
    with pytest.raises(InputError, match=r"got shape \(2, 2, 2\)"):
        evaluate_circuit(model(), TASK, np.zeros((2, 2, 2)), key=KEY)
    with pytest.raises(InputError, match="has one"):
        evaluate_circuit(model(), TASK[:1], GRAPH.edges, key=KEY)
