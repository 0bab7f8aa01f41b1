"""Every single edge of edge dropout against the masked forward, and a batch of equal examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from mi_jax.circuits import Graph, masked_forward, source_outputs
from mi_jax.validation import resampled_forward
from tests.circuits.tiny_task import model

# as a share of the largest logit, which is about 7
TOLERANCE = 1e-5
TOKENS = jax.random.randint(jax.random.key(0), (3, 6), 0, 13)


@pytest.mark.parametrize("attention_only", [False, True])
def test_a_single_edge_is_patched_from_the_example_before(attention_only):
    decoder = model(attention_only)
    graph = Graph.of(decoder.config)
    places = np.argwhere(graph.edges)
    one_edge = jnp.zeros((len(places), *graph.edges.shape)).at[np.arange(len(places)), *places.T].set(1.0)
    # one edge leaves what is upstream of it as in the plain run, so the plain run gives the patch
    patch = jnp.roll(source_outputs(decoder, TOKENS), 1, axis=1)
    got = jax.jit(jax.vmap(lambda e: resampled_forward(decoder, TOKENS, e)))(one_edge)
    expected = jax.jit(jax.vmap(lambda e: masked_forward(decoder, TOKENS, e, patch)))(one_edge)
    _assert_close(got, expected)


def test_among_equal_examples_resampling_changes_nothing():
    decoder = model()
    edges = jnp.asarray(Graph.of(decoder.config).edges, jnp.float32)
    same = jnp.broadcast_to(TOKENS[:1], TOKENS.shape)
    got = jax.jit(resampled_forward)(decoder, same, edges)
    _assert_close(got, mi.jit(decoder)(same))


def _assert_close(got, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * scale)
