"""Jaccard of circuits by hand, its null against draws and a closed form, and resampling of prompts."""

import functools

import jax
import numpy as np
import pytest

from mi_jax.circuits.graph import Graph
from mi_jax.circuits.metrics.faithfulness import random_edges, top_edges
from mi_jax.circuits.metrics.stability import (
    bootstrap_stability,
    group_stability,
    jaccard,
    per_prompt_scores,
    split_stability,
    stability_of,
    task_stability,
)
from mi_jax.circuits.scores import edge_scores
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model
from tests.circuits.wide_task import task

KEY = jax.random.key(0)
GRAPH = Graph(n_layers=2, n_heads=2, n_kv_heads=2, has_mlp=True)


def scores(n, noise, seed=0):
    """What the prompts share, and noise of each."""
    rng = np.random.default_rng(seed)
    shape = GRAPH.edges.shape
    return GRAPH.edges * (rng.normal(size=shape)[None] + noise * rng.normal(size=(n, *shape)))


def test_jaccard_by_hand():
    a = GRAPH.mask(["input->m0", "m0->logits", "m0->m1"])
    b = GRAPH.mask(["input->m0", "m0->logits", "m1->logits"])
    none = np.zeros_like(a)
    assert jaccard(a, b) == 0.5
    assert jaccard(a, none) == 0
    assert jaccard(none, none) == 1
    found = stability_of([a, b, a, none], GRAPH, key=KEY)
    assert found.jaccard.value == pytest.approx((0.5 + 1 + 0 + 0.5 + 0 + 0) / 6)
    assert found.frequency[GRAPH.index("input->m0")] == 0.75
    assert GRAPH.names(found.stable_edges(0.7)) == GRAPH.names(GRAPH.mask(["input->m0", "m0->logits"]))
    chosen = stability_of([a, b, a, none], GRAPH, key=KEY, pairs=np.array([[0, 2], [1, 2]]))
    assert chosen.jaccard.value == 0.75


def test_the_null_is_that_of_random_circuits():
    """Against circuits that are really drawn, and against n²/N edges in common to first order."""
    n = 30
    drawn = [random_edges(GRAPH, n, seed=s) for s in range(80)]
    real = stability_of(drawn, GRAPH, key=KEY)
    assert real.null.mean == pytest.approx(real.jaccard.value, abs=0.01)
    common = n * n / GRAPH.n_edges
    assert real.null.mean == pytest.approx(common / (2 * n - common), abs=0.01)


@pytest.mark.parametrize("select", ["absolute", "signed"])
def test_prompts_that_agree_are_stable_and_noise_is_not(select):
    same, noise = scores(20, 0.0), scores(20, 100.0)
    for method in (bootstrap_stability, split_stability):
        assert method(same, GRAPH, 10, key=KEY, select=select).jaccard.value == 1
    # halves share nothing but chance; resamples of the same prompts do
    split = split_stability(noise, GRAPH, 10, key=KEY, select=select)
    assert split.jaccard.value == pytest.approx(split.null.mean, abs=0.06)
    boot = bootstrap_stability(noise, GRAPH, 10, key=KEY, select=select)
    assert boot.jaccard.value > split.jaccard.value + 0.1
    assert boot.jaccard.ci_low <= boot.jaccard.value <= boot.jaccard.ci_high
    assert boot.frequency.sum() == pytest.approx(10)


def test_halves_share_no_prompt():
    """Prompts of two kinds with one edge each: halves of one prompt each never agree."""
    edges = ["input->m0", "m0->logits"]
    per_prompt = np.stack([GRAPH.mask([e]).astype(float) for e in edges])
    assert split_stability(per_prompt, GRAPH, 1, key=KEY).jaccard.value == 0


def test_groups_are_compared_as_groups():
    per_prompt = scores(6, 1.0)
    groups = ["a", "b", "a", "c", "b", "a"]
    found = group_stability(per_prompt, groups, GRAPH, 12, key=KEY)
    masks = [top_edges(per_prompt[np.array(groups) == g].mean(0), GRAPH, 12) for g in "abc"]
    expected = np.mean([jaccard(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert found.jaccard.value == pytest.approx(expected)
    with pytest.raises(InputError, match="6 prompts need as many group labels, got 2"):
        group_stability(per_prompt, ["a", "b"], GRAPH, 12, key=KEY)
    with pytest.raises(InputError, match="two or more circuits, got 1"):
        group_stability(per_prompt, ["a"] * 6, GRAPH, 12, key=KEY)


def test_scores_of_prompts_average_to_those_of_the_task():
    score = functools.partial(edge_scores, method="eap")
    graph = Graph.of(model().config)
    per_prompt = per_prompt_scores(score, model(), task())
    assert per_prompt.shape == (len(task()), *graph.edges.shape)
    np.testing.assert_allclose(per_prompt.mean(0), score(model(), task()), atol=1e-4)
    assert np.abs(per_prompt[0] - per_prompt[1]).max() > 1e-2
    found = task_stability(lambda t: top_edges(score(model(), t), graph, 8), [task(), task()], graph, key=KEY)
    assert found.jaccard.value == 1
