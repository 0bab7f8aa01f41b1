"""Distributed alignment search on a decoder that was trained: a sum modulo five, one summand interchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mi_jax.circuits.das import Triples, fit_das, principal_angles
from mi_jax.models import Decoder, DecoderConfig, init_decoder

pytestmark = pytest.mark.slow

N, EQUALS = 5, 5
CONFIG = DecoderConfig(
    n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, d_head=16, d_mlp=64, d_vocab=6, n_ctx=3, positions="learned"
)


def prompt(a, b):
    return jnp.stack([a, b, jnp.full_like(a, EQUALS)], -1)


@functools.cache
def trained() -> Decoder:
    """Answers a + b modulo five after `a b =`."""
    a, b = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(N, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)))
    optimiser = optax.adamw(3e-3, weight_decay=0.1)
    model = init_decoder(CONFIG, key=jax.random.key(0))

    def loss(model):
        logits = model(prompt(a, b))[:, -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, (a + b) % N).mean()

    def step(carry, _):
        model, state = carry
        value, grads = jax.value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), value

    fit = jax.jit(lambda model: jax.lax.scan(step, (model, optimiser.init(model)), None, 600))
    (model, _), losses = fit(model)
    assert losses[-1] < 0.05
    return model


@functools.cache
def result():
    values = jnp.stack([x.reshape(-1) for x in jnp.meshgrid(*[jnp.arange(N, dtype=jnp.int32)] * 4)])
    data = Triples(prompt(values[0], values[1]), prompt(values[2], values[3]), (values[2] + values[1]) % N)
    # five values lie in four dimensions
    return fit_das(trained(), data, site="resid_pre", k=N - 1, steps=600, seeds=2, key=jax.random.key(2))


def test_a_summand_is_in_its_own_embedding_and_the_subspace_is_the_span_of_its_differences():
    found, model = result(), trained()
    assert (found.iia.value[0, 0] > 0.95).all()
    np.testing.assert_allclose(found.whole_site.mean[0, 0], 1.0)
    differences = jnp.linalg.qr((model.embed[1:N] - model.embed[:1]).T)[0]
    # the loss is flat once every answer is right, so the span is found only as far as the answers need it
    angles = principal_angles(jnp.asarray(found.basis(0, 0)), differences)
    elsewhere = principal_angles(jnp.asarray(found.basis(0, 2)), differences)
    assert angles.max() < 0.8
    assert angles.mean() < 0.5 * elsewhere.mean()


def test_no_subspace_works_where_the_summand_cannot_be():
    found = result()
    # at the last position base and source are the same, and nothing has been read yet
    np.testing.assert_allclose(found.iia.value[0, 2], found.unedited, atol=1e-6)
    assert found.iia.mean[0, 1] < 0.35
    assert abs(found.unedited - 1 / N) < 0.1


def test_controls_stay_far_below():
    found = result()
    for name, control in found.controls.items():
        assert control.mean[0, 0] < 0.5, name
    assert found.excess[0, 0] > 0.5
