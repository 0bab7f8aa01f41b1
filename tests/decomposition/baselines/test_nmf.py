"""Codes against scipy's non-negative least squares and scikit-learn's transform; parts that are known are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.decomposition import NMF as ScikitNMF

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines import NMF, fit_nmf


@pytest.fixture(scope="module")
def parts():
    """Non-negative parts of disjoint coordinates, and sparse non-negative codes of them."""
    k_fires, k_size = jax.random.split(jax.random.key(2))
    directions = np.kron(np.eye(4), [[3.0, 1.0, 2.0]]).astype(np.float32)
    fires = jax.random.bernoulli(k_fires, 0.4, (500, 4))
    codes = jnp.where(fires, jax.random.uniform(k_size, (500, 4), minval=0.5, maxval=2.0), 0.0)
    return codes, jnp.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def test_codes_are_the_non_negative_least_squares(key):
    k_w, k_x = jax.random.split(key)
    # more directions than coordinates: the codes are not determined, what they reconstruct is
    for n in (5, 12):
        rows = jax.random.uniform(k_w, (n, 8))
        nmf = NMF(jnp.full(8, -1.0), rows / jnp.linalg.norm(rows, axis=1, keepdims=True), steps=1000, converged=True)
        x = 2 * jax.random.normal(k_x, (3, 10, 8))
        codes, y = nmf.encode(x), np.maximum(np.asarray(x).reshape(-1, 8) + 1, 0)
        assert (codes >= 0).all()
        oracle = np.stack([scipy.optimize.nnls(np.asarray(nmf.w_dec, np.float64).T, row)[0] for row in y])
        best = ((y - oracle @ np.asarray(nmf.w_dec)) ** 2).sum(1)
        ours = ((y - np.asarray(nmf(x)).reshape(-1, 8) - 1) ** 2).sum(1)
        np.testing.assert_allclose(ours, best, rtol=1e-4, atol=1e-4)
        if n == 5:
            np.testing.assert_allclose(codes.reshape(-1, 5), oracle, atol=2e-3)


@pytest.mark.parametrize("batch_size", [None, 100])
def test_known_parts_are_found(parts, key, batch_size):
    codes, directions = parts
    # the corner that the codes start from is not at 0, and some of it is negative
    x = codes @ directions + jnp.linspace(-2.0, 1.0, 12)[None, :]
    nmf = fit_nmf(x, 4, key=key, batch_size=batch_size, max_iter=500)
    cosines = np.asarray(nmf.w_dec @ directions.T)
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2, 3]
    assert cosines.max(1).min() > 0.99
    assert ((x - nmf(x)) ** 2).sum() / ((x - x.mean(0)[None]) ** 2).sum() < 0.01


def test_new_codes_are_those_of_scikit_learn(parts, key):
    codes, directions = parts
    x = codes @ directions
    nmf = fit_nmf(x, 3, key=key, steps=500)
    shifted = np.asarray(x, np.float64) - np.asarray(x, np.float64).min(0)
    oracle = ScikitNMF(n_components=3, max_iter=1000, tol=1e-8)  # pyright: ignore[reportArgumentType]
    oracle.fit(shifted)
    oracle.components_ = np.asarray(nmf.w_dec, np.float64)
    np.testing.assert_allclose(nmf.encode(x), oracle.transform(shifted), atol=2e-3)


def test_a_fit_that_did_not_converge_says_so(parts, key):
    x = parts[0] @ parts[1]
    assert fit_nmf(x, 4, key=key).converged
    assert not fit_nmf(x, 4, key=key, max_iter=2, tolerance=1e-9).converged


def test_what_cannot_be_fitted_is_refused(parts, key):
    x = parts[0]
    with pytest.raises(InputError, match=r"all 500 activations are equal: there is nothing to factorise"):
        fit_nmf(jnp.ones_like(x), 2, key=key)
    with pytest.raises(InputError, match=r"n_components, steps and batch_size are at least 1; got 0, 200 and None"):
        fit_nmf(x, 0, key=key)
    with pytest.raises(InputError, match=r"1 of 500 activations are NaN or infinite"):
        fit_nmf(x.at[3, 0].set(jnp.inf), 2, key=key)
