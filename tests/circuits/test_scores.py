"""Edge scores against the gradient of the masked forward, finite differences, and single runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.circuits import Graph, edge_scores, masked_forward, source_outputs
from tests.circuits.tiny_task import model, task

TASK = task()


@eqx.filter_jit
def metric(decoder, edges):
    patch = source_outputs(decoder, TASK.corrupt, TASK.mask)
    logits = masked_forward(decoder, TASK.clean, edges, patch, TASK.mask, output_pos=TASK.position)
    return TASK.logit_difference(logits).mean()


@pytest.mark.parametrize("attention_only", [False, True])
def test_eap_is_the_gradient_of_the_masked_forward_at_no_edges(attention_only):
    decoder = model(attention_only)
    edges = Graph.of(decoder.config).edges
    gradient = eqx.filter_jit(jax.grad(lambda e: metric(decoder, e)))(jnp.zeros(edges.shape))
    scores = edge_scores(decoder, TASK, method="eap")
    np.testing.assert_allclose(scores, np.where(edges, gradient, 0), atol=1e-5, rtol=1e-4)
    assert np.abs(scores).max() > 0.05
    assert (scores[~edges] == 0).all()


def test_eap_is_the_finite_difference():
    edges = Graph.of(model().config).edges
    scores = edge_scores(model(), TASK, method="eap")
    direction = np.where(edges, np.random.default_rng(0).normal(size=edges.shape), 0).astype(np.float32)
    step = 5e-3
    finite = (metric(model(), jnp.asarray(step * direction)) - metric(model(), jnp.asarray(-step * direction))) / (
        2 * step
    )
    np.testing.assert_allclose((scores * direction).sum(), finite, rtol=5e-3)


def test_exact_scores_are_single_runs():
    graph = Graph.of(model().config)
    scores = edge_scores(model(), TASK, method="exact", batch_size=3)
    none = jnp.zeros(graph.edges.shape)
    for source, reader in np.argwhere(graph.edges)[::7]:
        effect = metric(model(), none.at[source, reader].set(1.0)) - metric(model(), none)
        np.testing.assert_allclose(scores[source, reader], effect, atol=1e-5)
    assert (scores[~graph.edges] == 0).all()


def test_eap_ig_with_one_step_has_its_gradient_on_the_corrupt_embedding():
    """With the corrupt prompt in the clean one's place, EAP takes its gradient there, with the opposite difference."""
    swapped = eqx.tree_at(lambda t: (t.clean, t.corrupt), TASK, (TASK.corrupt, TASK.clean))
    one_step = edge_scores(model(), TASK, method="eap-ig", steps=1)
    np.testing.assert_allclose(one_step, -edge_scores(model(), swapped, method="eap"), atol=1e-5, rtol=1e-4)


def test_eap_ig_of_the_input_integrates_to_the_whole_effect():
    """Along the straight line of embeddings every path starts at the input: its edges' scores add up to the effect."""
    scores = edge_scores(model(), TASK, method="eap-ig", steps=400)
    edges = Graph.of(model().config).edges
    whole = metric(model(), jnp.asarray(edges, jnp.float32)) - metric(model(), jnp.zeros(edges.shape))
    np.testing.assert_allclose(scores[0].sum(), whole, rtol=0.02)


def test_an_unknown_method_is_named():
    # the function's own check, and that of its annotation, which comes first in tests
    with pytest.raises((ValueError, TypeError), match="'acdc'"):
        edge_scores(model(), TASK, method="acdc")
