"""Influence, scores, pruning and the JSON of attribution graphs, against numbers worked out by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mi_jax.circuits.features import AttributionGraph
from mi_jax.circuits.features.json import paired
from mi_jax.core.errors import InputError

# two features (layers 0 and 1), one error per layer, one token, two logits
FIRST, SECOND, ERROR_0, ERROR_1, TOKEN, LIKELY, OTHER = range(7)
EFFECTS = {
    (FIRST, TOKEN): 2.0,
    (SECOND, FIRST): -3.0,
    (SECOND, ERROR_0): 1.0,
    (LIKELY, SECOND): 1.0,
    (LIKELY, ERROR_1): 1.0,
    (OTHER, TOKEN): -5.0,
}


def graph(effects=None) -> AttributionGraph:
    adjacency = np.zeros((7, 7), np.float32)
    for place, effect in (EFFECTS if effects is None else effects).items():
        adjacency[place] = effect
    return AttributionGraph(
        tokens=np.array([4], np.int32),
        features=np.array([[0, 0, 1], [1, 0, 3]], np.int32),
        activations=np.array([1.5, 2.0], np.float32),
        logit_tokens=np.array([8, 5], np.int32),
        logit_probabilities=np.array([0.8, 0.2], np.float32),
        adjacency=adjacency,
        values=adjacency.sum(1) + 1,
        bias=np.ones(7, np.float32),
        n_layers=2,
        n_active=2,
    )


def test_influence_is_what_flows_back_from_the_logits():
    # from the likely logit .8, half of it to the second feature, three quarters of that to the first
    expected = [0.3, 0.4, 0.1, 0.4, 0.3 + 0.2, 0.0, 0.0]
    np.testing.assert_allclose(graph().influence(), expected, rtol=1e-6)


def test_scores():
    assert graph().replacement_score == pytest.approx(0.5 / (0.5 + 0.1 + 0.4))
    weights = np.array([0.3, 0.4, 0.1, 0.4, 0.5, 0.8, 0.2])
    not_errors = np.array([1, 3 / 4, 1, 1, 1, 1 / 2, 1])
    assert graph().completeness_score == pytest.approx((weights * not_errors).sum() / weights.sum())
    without = {place: effect for place, effect in EFFECTS.items() if place[1] not in (ERROR_0, ERROR_1)}
    assert graph(without).replacement_score == graph(without).completeness_score == 1.0
    assert np.isnan(graph({(LIKELY, FIRST): 1.0}).replacement_score)


def test_pruning_keeps_the_share_asked_for_and_nothing_that_leads_nowhere():
    everything = graph().prune(1.0, 1.0)
    assert everything.nodes.all()
    assert set(zip(*np.nonzero(everything.edges), strict=True)) == set(EFFECTS)
    # .5 of 1.7 is below the share .4, .5 + .4 is not; equal influences come together
    pruned = graph().prune(0.4, 1.0)
    assert np.flatnonzero(pruned.nodes).tolist() == [ERROR_1, TOKEN, LIKELY, OTHER]
    assert set(zip(*np.nonzero(pruned.edges), strict=True)) == {(LIKELY, ERROR_1), (OTHER, TOKEN)}
    assert pruned.cumulative[TOKEN] == pytest.approx(0.5 / 1.7)
    assert pruned.cumulative[ERROR_0] == pytest.approx(1.0)


def test_a_feature_without_a_way_to_the_logits_is_dropped_with_all_that_only_feeds_it():
    effects = EFFECTS | {(LIKELY, SECOND): 1e-9}
    pruned = graph(effects).prune(1.0, 0.9)
    assert not pruned.nodes[[FIRST, SECOND, ERROR_0]].any()
    assert not pruned.edges[[FIRST, SECOND]].any()


def test_what_the_nodes_do_not_add_up_to():
    np.testing.assert_allclose(graph().remainder, 0.0, atol=1e-6)
    more = dataclasses.replace(graph(), values=graph().values + 0.5)
    np.testing.assert_allclose(more.remainder, [0.5, 0.5, 0, 0, 0, 0.5, 0.5], atol=1e-6)


def unpaired(number):
    """Layer and latent, as the viewer gets them back."""
    total = math.isqrt(8 * number + 1) // 2 + math.isqrt(8 * number + 1) % 2 - 1
    latent = number - total * (total + 1) // 2
    return total - latent, latent


def test_json_is_that_of_circuit_tracer():
    made = json.loads(json.dumps(graph().to_json(words="abcdefghi".__getitem__, node_threshold=1.0, edge_threshold=1)))
    by_id = {node["node_id"]: node for node in made["nodes"]}
    assert len(by_id) == 7
    assert by_id["0_1_0"]["activation"] == 1.5
    # the viewer takes layer and latent from one number
    assert by_id["1_3_0"]["feature"] == 13
    assert (paired(1, 7), unpaired(43)) == (43, (1, 7))
    assert {unpaired(paired(layer, latent)) for layer in range(9) for latent in range(9)} == set(np.ndindex(9, 9))
    assert by_id["1_-1_0"]["feature_type"] == by_id["0_-1_0"]["feature_type"] == "mlp reconstruction error"
    assert by_id["1_-1_0"]["feature"] == -1
    assert len({node["jsNodeId"] for node in made["nodes"]}) == 7
    assert by_id["E_4_0"]["layer"] == "E"
    assert by_id["3_8_0"] | {"clerp": 'Output "i" (p=0.800)', "is_target_logit": True} == by_id["3_8_0"]
    links = {(link["source"], link["target"]): link["weight"] for link in made["links"]}
    assert links[("0_1_0", "1_3_0")] == -3.0
    assert links[("1_-1_0", "3_8_0")] == 1.0
    assert len(links) == len(EFFECTS)
    assert made["metadata"]["prompt_tokens"] == ["e"]
    assert made["metadata"]["scan"] == "decoder"
    assert graph().to_json(scan=["a", "b"])["metadata"]["transcoder_list"] == ["a", "b"]


def test_faults_are_named():
    with pytest.raises(InputError, match="node_threshold is a share"):
        graph().prune(1.2)
    with pytest.raises(InputError, match="have a cycle"):
        graph(EFFECTS | {(FIRST, SECOND): 1.0}).influence()
    with pytest.raises(InputError, match="are 8 nodes; got"):
        dataclasses.replace(graph(), n_layers=3)
