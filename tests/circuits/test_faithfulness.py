"""Faithfulness: its ends, its curve, the choice of edges, and what `discover` returns."""

import warnings

import equinox as eqx
import jax
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
from mi_jax.circuits.metrics.faithfulness import pruned, sizes
from mi_jax.core.errors import InputError
from mi_jax.data import TaskWarning
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
    np.testing.assert_allclose(values, [1, 0, 1 - exact[edge] / whole], atol=1e-4)
    assert abs(exact[edge] / whole) > 1e-2


def test_faithfulness_is_undefined_where_nothing_changes():
    same = eqx.tree_at(lambda t: t.corrupt, TASK, TASK.clean)
    with pytest.raises(
        ValueError, match="task 'tiny': faithfulness is undefined: clean and corrupt prompts give the same metric"
    ):
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


def test_signed_and_absolute_selection_by_hand():
    scores = np.zeros(GRAPH.edges.shape)
    for edge, value in {"m0->logits": -3.0, "input->m0": 2.0, "m1->logits": 1.0}.items():
        scores[GRAPH.index(edge)] = value
    assert GRAPH.names(top_edges(scores, GRAPH, 1)) == ["m0->logits"]
    assert set(GRAPH.names(top_edges(scores, GRAPH, 2, select="signed"))) == {"input->m0", "m1->logits"}
    # the most negative edge is the last that signed selection takes
    assert not top_edges(scores, GRAPH, GRAPH.n_edges - 1, select="signed")[GRAPH.index("m0->logits")]
    with pytest.raises(InputError, match="score NaN"):
        top_edges(np.where(GRAPH.mask(["input->m0"]), np.nan, scores), GRAPH, 3)
    with pytest.raises(InputError, match=r"the array given is \(2, 2\)"):
        top_edges(np.zeros((2, 2)), GRAPH, 1)


def test_areas_by_hand():
    drawn = Curve((0.1, 0.5, 1.0), (1, 5, 10), (2.0, 0.5, 1.0), kept=(0, 4, 10), n_edges=10)
    assert drawn.cpr == pytest.approx(0.4 * 1.25 + 0.5 * 0.75)
    # |1 − f| is 1, 0.5, 0
    assert drawn.cmd == pytest.approx(0.4 * 0.75 + 0.5 * 0.25)
    # at the true sizes 0, 0.4, 1, from f = 0 at no edge
    assert drawn.cpr_from_zero == pytest.approx(0.4 * 1.25 + 0.6 * 0.75)
    assert drawn.cmd_from_zero == pytest.approx(0.4 * 0.75 + 0.6 * 0.25)
    with pytest.raises(InputError, match="made by hand"):
        drawn.intervals(key=jax.random.key(0))


def test_sizes_round_or_are_cut():
    assert sizes(GRAPH, (0.001, 0.6, 1.0)) == (1, 22, 36)
    assert sizes(GRAPH, (0.001, 0.6, 1.0), floor=True) == (0, 21, 36)
    assert sizes(GRAPH, (0.6,), floor=True, n_pos=4) == (86,)


def test_pruning_by_hand():
    """EAP-IG's rule and ours on a head that reads by its queries alone, and on edges that lead nowhere."""
    graph = Graph(n_layers=2, n_heads=2, n_kv_heads=2, has_mlp=True)
    queries = ["input->a1.h0<q>", "a1.h0->logits"]
    values = ["input->a0.h1<v>", "a0.h1->logits"]
    dangling = ["m0->logits", "input->a0.h0<v>", "a1.h0->m1"]
    mask = graph.mask([*queries, *values, *dangling])
    assert set(graph.names(pruned(mask, graph, "mib"))) == {*queries, *values}
    assert set(graph.names(pruned(mask, graph, "connected"))) == {*queries, *values}
    assert (pruned(mask, graph, "none") == mask).all()
    # a chain is deleted from its loose end on, over as many rounds as it is long
    chain = graph.mask(["input->m0", "m0->a1.h0<k>", "a1.h0->m1"])
    assert not pruned(chain, graph, "mib").any()
    with pytest.raises(InputError, match="no positions"):
        pruned(np.repeat(mask[:, :, None], 4, 2), graph, "mib")


def test_intervals_come_from_resampled_prompts(exact):
    """The bootstrap of CMD has the spread of CMD over all resamples of two prompts, which can be listed."""
    found = curve(model(), TASK, exact, (0.05, 0.2, 1.0), select="signed", prune="mib", floor=True)
    intervals = found.intervals(key=jax.random.key(0))
    assert intervals["cpr"].value == pytest.approx(found.cpr)
    assert intervals["cmd"].value == pytest.approx(found.cmd)
    assert [intervals[f"f_{i}"].value for i in range(3)] == pytest.approx(list(found.values))
    listed = []
    for rows in ([0, 0], [0, 1], [1, 1]):
        metric = found.runs.metric[:, rows].mean(1)
        f = (metric[:-2] - metric[-2]) / (metric[-1] - metric[-2])
        listed.append(np.trapezoid(f, found.fractions))
    assert intervals["cpr"].ci_low == pytest.approx(min(listed), abs=1e-6)
    assert intervals["cpr"].ci_high == pytest.approx(max(listed), abs=1e-6)
    assert found.kept[0] <= found.edges[0]
    assert found.kl[-1] == pytest.approx(0, abs=1e-6)
    assert found.agreement[-1] == 1
    one = TASK[:1]
    with pytest.raises(InputError, match="two or more"):
        curve(model(), one, exact, (0.5, 1.0)).intervals(key=jax.random.key(0))


def test_zero_ablation_is_passed_on(exact):
    """All edges zeroed is the model's head on biases alone; one edge kept is the same for either way of saying zero."""
    keep = GRAPH.mask(["input->m0", "m0->logits"])
    values = faithfulness(model(), TASK, [keep], ablation="zero")
    zeros = jnp.zeros((GRAPH.n_sources, *TASK.clean.shape, model().config.d_model))
    np.testing.assert_allclose(values, faithfulness(model(), TASK, [keep], ablation=zeros), atol=TOLERANCE)
    assert abs(values[0] - faithfulness(model(), TASK, [keep])[0]) > 1e-3


def test_token_edges(exact):
    """Edges kept at every position are the edges; kept at one position only, they are something else."""
    everywhere = np.repeat(exact[:, :, None], 4, 2)
    mask = np.repeat(top_edges(exact, GRAPH, 10)[:, :, None], 4, 2)
    early = mask.copy()
    early[:, :, 2:] = False
    values = faithfulness(model(), TASK, [mask, early])
    assert values[0] == pytest.approx(faithfulness(model(), TASK, [mask[:, :, 0]])[0], abs=TOLERANCE)
    assert abs(values[0] - values[1]) > 1e-3
    assert top_edges(everywhere, GRAPH, 8).sum() == 8
    assert curve(model(), TASK, everywhere, (0.5, 1.0)).values[-1] == pytest.approx(1, abs=1e-4)


def test_a_task_that_the_model_does_not_do_says_so():
    """Its metric is larger on the counterfactual prompts: for one of the two orders of answer and distractor."""
    turned = eqx.tree_at(lambda t: (t.answer, t.distractor), TASK, (TASK.distractor, TASK.answer))
    clean, corrupt = _metric(TASK.clean), _metric(TASK.corrupt)
    done, undone = (TASK, turned) if clean > corrupt else (turned, TASK)
    with pytest.warns(TaskWarning, match=r"does not do task 'tiny': its metric is .* on the clean prompts"):
        discover(model(), undone, n_edges=3, method="eap")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faithfulness(model(), done, [])
