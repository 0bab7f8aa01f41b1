"""Edges between features against dense gradients, and circuits against runs with their nodes ablated by hand."""

import collections
import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits.features import (
    feature_edges,
    feature_effects,
    feature_faithfulness,
    random_nodes,
    sparse_feature_circuit,
    splice_dictionaries,
)
from mi_jax.core.errors import InputError
from mi_jax.core.sites import SiteError
from mi_jax.decomposition import DictionaryConfig, init
from tests.circuits.features.spliced_cases import D_SAE, PLACES, TOLERANCE, acts, close, metric, nodes_of, spliced
from tests.circuits.tiny_task import model, task


def test_edges_are_dense_gradients_around_the_places_between():
    rng = np.random.default_rng(0)
    places = (PLACES[0], PLACES[2], PLACES[3])
    effects = feature_effects(spliced(places), task())
    nodes = []
    for index, place in enumerate(places):
        active = np.argwhere(np.abs(effects.features[place]) > 1e-3)
        for pos, latent in active[rng.permutation(len(active))[:2]].tolist():
            nodes.append((index, pos, latent))
        nodes += [(index, 2, -1), (index, -1, int(active[0, 1])), (index, -1, -1)]
    nodes = np.asarray(nodes, np.int32)[rng.permutation(len(nodes))]
    weights = feature_edges(spliced(places), task(), nodes, ablation="resample")

    t, clean = task(), acts()[0]

    @functools.cache
    def gradients(place):
        one = spliced(places).dictionaries[place]
        z, e, _, _ = nodes_of(place)
        return jax.grad(lambda z, e: metric(*place, one.decode(z) + e), (0, 1))(z, e)

    @functools.cache
    def pulled_back(source, target):
        """From cotangents of the codes and errors of a place to those of an earlier one."""
        held = [mi.patch(site, clean[site, n], layer=n) for site, n in places[source + 1 : target]]
        (site, layer), (to, to_layer) = places[source], places[target]
        one, later = (spliced(places).dictionaries[places[i]] for i in (source, target))

        def parts(z, e):
            changed = mi.patch(site, one.decode(z) + e, layer=layer)
            run = mi.capture(mi.intervene(model(), changed, *held), mi.at(to, layers=to_layer))
            x = run(t.clean, t.mask, output=False)[1][to]
            codes = later.encode(x)
            return codes, x - later.decode(codes)

        point = nodes_of(places[source])[:2]
        return jax.jit(lambda cotangent: jax.vjp(parts, *point)[1](cotangent))

    def only(node, z, e):
        """These numbers at the node, and 0 elsewhere."""
        _, pos, latent = node
        here = (np.arange(4) == pos) | (pos < 0)
        of_code = here[:, None] & (np.arange(D_SAE) == latent)[None]
        return np.asarray(z) * of_code[None], np.asarray(e) * (here & (latent < 0))[None, :, None]

    expected = np.zeros_like(weights)
    for i, target in enumerate(nodes.tolist()):
        cotangent = only(target, *gradients(places[target[0]]))
        for place in range(target[0]):
            of_z, of_e = (np.asarray(a) for a in pulled_back(place, target[0])(cotangent))
            z, e, z_other, e_other = (np.asarray(a) for a in nodes_of(places[place]))
            for j in np.flatnonzero(nodes[:, 0] == place).tolist():
                change = only(nodes[j].tolist(), z - z_other, e - e_other)
                expected[i, j] = (of_z * change[0]).sum() + (of_e * change[1]).sum()
    close(weights, expected)
    assert (np.abs(expected) > 1e-2).sum() > 20


def test_faithfulness_of_everything_of_nothing_and_of_some():
    one_place = spliced(PLACES[:1])
    place, dictionary = PLACES[0], spliced().dictionaries[PLACES[0]]
    everything = np.array([(0, -1, latent) for latent in range(-1, D_SAE)], np.int32)
    found = feature_faithfulness(one_place, task(), everything, ablation="resample")
    assert found.faithfulness == pytest.approx(1.0)
    assert found.completeness == pytest.approx(0.0)
    assert found.full == pytest.approx(float(metric(*place, acts()[0][place])), abs=TOLERANCE)
    nothing = feature_faithfulness(one_place, task(), everything[:0], ablation="resample")
    assert (nothing.faithfulness, nothing.completeness) == (pytest.approx(0.0), pytest.approx(1.0))

    # one latent everywhere, another at one position, and the error at one
    nodes = np.array([(0, -1, 1), (0, 2, 5), (0, 1, -1)], np.int32)
    found = feature_faithfulness(one_place, task(), nodes, ablation="resample")
    z, e, z_other, e_other = nodes_of(place)
    mixed = z_other.at[:, :, 1].set(z[:, :, 1]).at[:, 2, 5].set(z[:, 2, 5])
    close(found.circuit, metric(*place, dictionary.decode(mixed) + e_other.at[:, 1].set(e[:, 1])))
    mixed = z.at[:, :, 1].set(z_other[:, :, 1]).at[:, 2, 5].set(z_other[:, 2, 5])
    close(found.complement, metric(*place, dictionary.decode(mixed) + e.at[:, 1].set(e_other[:, 1])))
    kept = feature_faithfulness(one_place, task(), nodes, ablation="resample", keep_errors=True)
    close(kept.empty, metric(*place, dictionary.decode(z_other) + e))


def test_intervals_and_random_circuits_of_a_circuit():
    one_place = spliced(PLACES[:1])
    place, dictionary = PLACES[0], spliced().dictionaries[PLACES[0]]
    z, e, z_other, e_other = (np.asarray(a) for a in nodes_of(place))
    nodes = np.array([(0, 1, 1), (0, 2, 5), (0, 2, 7), (0, -1, 3), (0, 1, -1)], np.int32)
    drawn = random_nodes(one_place, task(), nodes, 20, ablation="resample")
    moved = (z != z_other).any(0)
    for each in drawn:
        assert len({tuple(row) for row in each.tolist()}) == len(each) == len(nodes)
        kinds = [collections.Counter((pos < 0, latent < 0) for _, pos, latent in n.tolist()) for n in (each, nodes)]
        assert kinds[0] == kinds[1]
        features = each[(each[:, 1] >= 0) & (each[:, 2] >= 0)]
        assert moved[features[:, 1], features[:, 2]].all()
        assert moved[:, each[each[:, 1] < 0][:, 2]].any()
    assert len({each.tobytes() for each in drawn}) > 10
    # nothing is drawn from padding, where there is nothing to ablate
    padded = eqx.tree_at(lambda t: t.mask, task(), task().mask.at[:, 0].set(False))
    for each in random_nodes(one_place, padded, nodes, 20, ablation="resample"):
        assert not (each[:, 1] == 0).any()
    found = feature_faithfulness(one_place, task(), nodes, ablation="resample", null_circuits=3, seed=5)
    assert found.runs.shape == (4, len(task().clean))
    # the second random circuit, by hand
    second = random_nodes(one_place, task(), nodes, 3, ablation="resample", seed=5)[1]
    mixed, error = z_other.copy(), e_other.copy()
    for _, pos, latent in second.tolist():
        at = slice(None) if pos < 0 else pos
        if latent < 0:
            error[:, at] = e[:, at]
        else:
            mixed[:, at, latent] = z[:, at, latent]
    close(found.random[1, 0].mean(), metric(*place, dictionary.decode(jnp.asarray(mixed)) + error))
    null = found.faithfulness_null
    assert null.smallest <= null.mean <= null.largest
    values = (found.random[:, 1].mean(1) - found.empty) / (found.full - found.empty)
    assert found.completeness_null.mean == pytest.approx(values.mean())
    for name, interval in found.intervals(key=jax.random.key(0)).items():
        assert interval.value == pytest.approx(getattr(found, name))
        assert interval.ci_low < interval.value < interval.ci_high
    # all that is equal between prompts has no width
    same = dataclasses.replace(found, runs=np.repeat(found.runs[:, :1], 2, axis=1))
    interval = same.intervals(key=jax.random.key(0))["faithfulness"]
    assert interval.ci_low == pytest.approx(interval.ci_high)
    with pytest.raises(InputError, match="this task has one"):
        dataclasses.replace(found, runs=found.runs[:, :1], random=found.random[..., :1]).intervals(
            key=jax.random.key(0)
        )
    with pytest.raises(InputError, match="no random circuits were run"):
        _ = dataclasses.replace(found, random=found.random[:0]).faithfulness_null


@pytest.mark.slow
def test_a_circuit_of_all_places_has_the_nodes_and_edges_over_the_thresholds():
    effects = feature_effects(spliced(), task())
    circuit = sparse_feature_circuit(spliced(), task(), node_threshold=0.1, edge_threshold=0.05, effects=effects)
    count = sum((np.abs(x) > 0.1).sum() for found in (effects.features, effects.errors) for x in found.values())
    assert 5 < len(circuit.nodes) == count
    assert circuit.places == PLACES
    for (place, pos, latent), effect in zip(circuit.nodes.tolist(), circuit.effects, strict=True):
        where = effects.errors if latent < 0 else effects.features
        assert effect == where[PLACES[place]][(pos,) if latent < 0 else (pos, latent)]
    np.testing.assert_array_equal(circuit.edges, np.abs(circuit.weights) > 0.05)
    assert not circuit.weights[circuit.nodes[:, 0][:, None] <= circuit.nodes[:, 0][None, :]].any()
    made = circuit.to_json()
    assert len(made["nodes"]) == count
    assert len(made["edges"]) == circuit.edges.sum() > 0
    whole = sparse_feature_circuit(
        spliced(), task(), node_threshold=0.1, edge_threshold=0.05, effects=effects, positions=False
    )
    assert (whole.nodes[:, 1] == -1).all()
    assert any(name.endswith("/all/error") for name in whole.to_json()["nodes"])
    # a larger circuit leaves less out
    alone = [
        abs(1 - feature_faithfulness(spliced(), task(), c, ablation="resample").faithfulness)
        for c in (
            circuit,
            sparse_feature_circuit(spliced(), task(), node_threshold=0.0, edge_threshold=1.0, effects=effects),
        )
    ]
    assert alone[1] < 1e-4 < alone[0]


def test_faults_are_named():
    sae = init(DictionaryConfig(8, D_SAE, "relu"), key=jax.random.key(0))
    with pytest.raises(InputError, match="no dictionaries"):
        splice_dictionaries(model(), {})
    with pytest.raises(SiteError, match="has 2 layers"):
        splice_dictionaries(model(), {("resid_post", 2): sae})
    with pytest.raises(InputError, match=r"'attn\.z' has axes layer batch pos head d_head; dictionaries go to"):
        splice_dictionaries(model(), {("attn.z", 0): sae})
    with pytest.raises(InputError, match="reads width 6 and writes 6; tiny has d_model=8"):
        splice_dictionaries(model(), {("mlp_out", 0): init(DictionaryConfig(6, 8, "relu"), key=jax.random.key(0))})
    skip = init(DictionaryConfig(8, 8, "relu", skip=True, transcoder=True), key=jax.random.key(0))
    with pytest.raises(InputError, match="has a skip or a token norm"):
        splice_dictionaries(model(), {("mlp_out", 0): skip})
    with pytest.raises(InputError, match="ablation is one of resample, zero, mean, mean-positional; got 'median'"):
        feature_effects(spliced(), task(), ablation="median")
    with pytest.raises(InputError, match=r"latents 0–11 .* positions 0–3 .* got latent 12 at position 0"):
        feature_faithfulness(spliced(), task(), np.array([(0, 0, 12)], np.int32))
    with pytest.raises(InputError, match="there are places 0–3; got a node of place 4"):
        feature_faithfulness(spliced(), task(), np.array([(4, 0, 1)], np.int32))
    with pytest.raises(InputError, match="no node has an effect over node_threshold=100"):
        sparse_feature_circuit(spliced(), task(), node_threshold=100.0, edge_threshold=1.0, method="attribution")
    same = eqx.tree_at(lambda t: t.corrupt, task(), task().clean)
    with pytest.raises(InputError, match="no circuit can be told from another"):
        feature_faithfulness(spliced(), same, np.array([(0, 0, 1)], np.int32), ablation="resample")
