"""The dictionary's calls against each other, and its loss against the equation in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition.sae import SAE, SAEConfig, init, loss

CONFIG = SAEConfig(d_model=6, d_sae=16, k=3, k_aux=4, aux_coefficient=0.5, aux_candidates=8)


@pytest.fixture(scope="module")
def sae():
    k_init, k_enc, k_bias, k_mean = jax.random.split(jax.random.key(1), 4)
    sae = init(CONFIG, key=k_init, mean=jax.random.normal(k_mean, (6,)))
    return dataclasses.replace(
        sae, w_enc=jax.random.normal(k_enc, (16, 6)), b_enc=0.1 * jax.random.normal(k_bias, (16,))
    )


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (2, 5, 6))


def numpy_codes(sae, x, k, allowed=None):
    h = (x - np.asarray(sae.b_dec)) @ np.asarray(sae.w_enc).T + np.asarray(sae.b_enc)
    if allowed is not None:
        h = np.where(allowed, h, -np.inf)
    kth = -np.sort(-h, axis=-1)[..., k - 1 : k]
    return np.where(h >= kth, np.maximum(h, 0), 0)


def test_calls_agree_with_the_equation_on_any_leading_axes(sae, x):
    codes = numpy_codes(sae, np.asarray(x), CONFIG.k)
    np.testing.assert_allclose(sae.encode(x), codes, atol=1e-5)
    want = codes @ np.asarray(sae.w_dec) + np.asarray(sae.b_dec)
    np.testing.assert_allclose(sae.decode(sae.encode(x)), want, atol=1e-5)
    np.testing.assert_allclose(sae(x), want, atol=1e-5)
    np.testing.assert_allclose(sae(x[0, 0]), want[0, 0], atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.vmap(sae))(x), want, atol=1e-5)
    values, indices = sae.encode_sparse(x)
    np.testing.assert_allclose(values, np.take_along_axis(codes, np.asarray(indices), -1), atol=1e-5)


def test_init_ties_encoder_to_unit_decoder():
    sae = init(CONFIG, key=jax.random.key(0))
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec)


compiled_loss = jax.jit(loss, static_argnums=3)


@pytest.mark.parametrize("n_dead", [0, 2, 9])
def test_loss_is_the_equation(sae, x, n_dead):
    x = np.asarray(x).reshape(-1, 6)
    dead = np.arange(16) < n_dead
    w_dec, b_dec = np.asarray(sae.w_dec), np.asarray(sae.b_dec)
    codes = numpy_codes(sae, x, CONFIG.k)
    error = x - b_dec - codes @ w_dec
    aux = 0.0
    if n_dead:
        places = min(n_dead, CONFIG.k_aux)
        candidates = dead & (np.arange(16) < CONFIG.aux_candidates)
        rest = error - numpy_codes(sae, x, places, allowed=candidates) @ w_dec
        aux = min(n_dead / CONFIG.k_aux, 1.0) * np.mean(rest**2)
    total, parts = compiled_loss(sae, jnp.asarray(x), jnp.asarray(dead), CONFIG)
    np.testing.assert_allclose(total, np.mean(error**2) + 0.5 * aux, rtol=1e-5)
    np.testing.assert_allclose(parts.auxiliary, aux, rtol=1e-5)
    np.testing.assert_array_equal(parts.fired, (codes > 0).sum(0))


def test_auxiliary_loss_moves_dead_latents_only(sae, x):
    x, dead = x.reshape(-1, 6), jnp.arange(16) < 5
    # dead in truth too: the bias keeps these latents out of the k places
    sae = dataclasses.replace(sae, b_enc=jnp.where(dead, -1e-3, 100.0))

    @jax.jit
    def gradient(dead) -> SAE:
        return jax.grad(lambda s: loss(s, x, dead, CONFIG)[0])(sae)

    with_aux, without = gradient(dead), gradient(jnp.zeros(16, bool))
    for a, b in ((with_aux.w_enc, without.w_enc), (with_aux.w_dec, without.w_dec)):
        np.testing.assert_allclose(a[5:], b[5:], atol=1e-6)
        assert jnp.abs(b[:5]).max() == 0
        assert (jnp.abs(a[:5]).max(1) > 0).any()
    np.testing.assert_allclose(with_aux.b_dec, without.b_dec, atol=1e-6)


def test_faults_are_named(sae):
    with pytest.raises(ValueError, match=r"width 6, got shape \(3, 5\)"):
        sae(jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="k=40"):
        SAEConfig(d_model=6, d_sae=16, k=40, k_aux=4)
    with pytest.raises(ValueError, match="k_aux=5 must be at most aux_candidates=4"):
        SAEConfig(d_model=6, d_sae=16, k=3, k_aux=5, aux_candidates=4)
    with pytest.raises(ValueError, match="d_sae must be at least 1"):
        SAEConfig(d_model=6, d_sae=0, k=1)
