"""Exact edge scores against one masked run for every edge, and by hand."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits.ablation.values import ablation_values
from mi_jax.circuits.graph import Graph
from mi_jax.circuits.runs.exact import exact_edges
from mi_jax.circuits.runs.masked import masked_forward
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import CONFIG, model, task
from tests.models.tiny_families import family

TASK = task()
TOLERANCE = 2e-5


@eqx.filter_jit
def _metrics(decoder, corrupted, patch):
    def one(edges):
        logits = masked_forward(decoder, TASK.clean, edges, patch, TASK.mask, output_pos=TASK.position)
        return TASK.metric(logits).mean()

    return jax.lax.map(one, corrupted)


def one_by_one(decoder, base, ablation="resample"):
    """`m(base with the edge) − m(base without it)`, from a masked run for each."""
    edges = Graph.of(decoder.config).edges
    edges = np.broadcast_to(edges.reshape(edges.shape + (1,) * (base.ndim - 2)), base.shape)
    places = np.argwhere(edges)
    kept = np.repeat(base[None], 1 + len(places), 0)
    kept[np.arange(1, len(kept)), *places.T] ^= True
    patch = ablation_values(decoder, TASK, ablation)
    metric = np.asarray(_metrics(decoder, jnp.asarray(edges & ~kept, jnp.float32), patch))
    scores = np.zeros(edges.shape, np.float32)
    scores[*places.T] = (metric[0] - metric[1:]) * np.where(base[*places.T], 1, -1)
    return scores


# parallel blocks, grouped heads with norms of outputs, a norm over all heads with experts, heads without an MLP
@pytest.mark.parametrize("name", ["neox", "gemma", "mixture", "attention-only"])
def test_scores_are_those_of_single_runs(name):
    decoder = model(attention_only=True) if name == "attention-only" else family(name)
    expected = one_by_one(decoder, Graph.of(decoder.config).edges)
    np.testing.assert_allclose(exact_edges(decoder, TASK, batch_size=5), expected, atol=TOLERANCE)
    assert np.abs(expected).max() > 1e-2


def test_a_base_takes_edges_away_and_adds_them():
    decoder = model()
    edges = Graph.of(decoder.config).edges
    base = edges & (np.random.default_rng(0).random(edges.shape) < 0.5)
    expected = one_by_one(decoder, base, "mean")
    found = exact_edges(decoder, TASK, ablation="mean", base=base, batch_size=7)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(expected[base]).max() > 1e-2
    assert np.abs(expected[edges & ~base]).max() > 1e-2
    few = base & (np.random.default_rng(1).random(edges.shape) < 0.2)
    some = exact_edges(decoder, TASK, ablation="mean", base=base, among=few, batch_size=7)
    np.testing.assert_allclose(some, np.where(few, expected, 0), atol=TOLERANCE)


def test_edges_at_one_position_each():
    decoder = model()
    edges, n_pos = Graph.of(decoder.config).edges, TASK.clean.shape[1]
    everywhere = np.repeat(edges[:, :, None], n_pos, 2)
    expected = one_by_one(decoder, everywhere)
    found = exact_edges(decoder, TASK, positions=True, batch_size=7)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(expected).max() > 1e-2
    # the prompts differ at one position, from which on alone the edges of the input can matter
    assert not found[0, :, 0].any()
    assert found[0, :, 1].any()
    base = everywhere & (np.random.default_rng(0).random(everywhere.shape) < 0.5)
    among = everywhere & (np.random.default_rng(1).random(everywhere.shape) < 0.2)
    some = exact_edges(decoder, TASK, base=base, among=among, positions=True, batch_size=7)
    np.testing.assert_allclose(some, np.where(among, one_by_one(decoder, base), 0), atol=TOLERANCE)


def test_nothing_after_the_answer_is_run():
    early = dataclasses.replace(TASK, position=jnp.array([1, 1], jnp.int32))
    found = exact_edges(model(), early, positions=True, batch_size=7)
    assert found[:, :, :2].any()
    assert not found[:, :, 2:].any()
    # where every position sees every other, those after it matter too
    seeing = dataclasses.replace(model(), config=dataclasses.replace(CONFIG, causal=False))
    found = exact_edges(seeing, early, positions=True, batch_size=7)
    graph, patch = Graph.of(CONFIG), ablation_values(seeing, early)
    s, r = graph.index("input->a0.h0<v>")
    cut = jnp.zeros((*graph.edges.shape, 4)).at[s, r, 2].set(1.0)
    runs = [masked_forward(seeing, TASK.clean, c, patch, TASK.mask, output_pos=early.position) for c in (cut * 0, cut)]
    lost = [float(early.metric(logits).mean()) for logits in runs]
    assert found[s, r, 2] == pytest.approx(lost[0] - lost[1], abs=TOLERANCE)
    assert found[:, :, 2].any()


def test_a_base_of_another_model_is_named():
    with pytest.raises(InputError, match=r"base has shape \(7, 11\) \[source reader\], got \(7, 12\)"):
        exact_edges(model(), TASK, base=np.zeros((7, 12), bool))
    with pytest.raises(InputError, match=r"among has shape \(7, 11, 4\) \[source reader pos\], got \(7, 11\)"):
        exact_edges(model(), TASK, among=np.zeros((7, 11), bool), positions=True)
