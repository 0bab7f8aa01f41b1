"""Encoders of random directions against numpy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines import fit_random_directions


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (40, 8)) + 1.0


def test_a_pseudo_inverse_reconstructs_as_well_as_any_linear_encoder(x, key):
    for n in (5, 20):
        random = fit_random_directions(x, n, key=key)
        rest = np.asarray(x - random.mean[None, :], np.float64)
        oracle = np.linalg.lstsq(np.asarray(random.w_dec, np.float64).T, rest.T, rcond=None)[0].T
        np.testing.assert_allclose(random.encode(x), oracle, atol=1e-4)
        np.testing.assert_allclose(random(x) - x, oracle @ np.asarray(random.w_dec) - rest, atol=1e-4)
        np.testing.assert_allclose(jnp.linalg.norm(random.w_dec, axis=1), 1, rtol=1e-6)


def test_k_codes_are_the_largest_inner_products_and_can_be_fitted_again(x, key):
    plain = fit_random_directions(x, 20, "top_k", 3, key=key)
    fitted = fit_random_directions(x, 20, "least_squares", 3, key=key)
    np.testing.assert_array_equal(plain.w_dec, fitted.w_dec)
    codes, refitted = plain.encode(x), fitted.encode(x)
    for i, row in enumerate(np.asarray(x - plain.mean[None, :])):
        products = np.asarray(plain.w_dec) @ row
        chosen = np.sort(np.argsort(-np.abs(products))[:3])
        np.testing.assert_array_equal(np.flatnonzero(codes[i]), chosen)
        np.testing.assert_array_equal(np.flatnonzero(refitted[i]), chosen)
        np.testing.assert_allclose(codes[i, chosen], products[chosen], atol=1e-5)
        best = np.linalg.lstsq(np.asarray(plain.w_dec)[chosen].T, row, rcond=None)[0]
        np.testing.assert_allclose(refitted[i, chosen], best, atol=1e-4)
    assert ((x - fitted(x)) ** 2).sum() < ((x - plain(x)) ** 2).sum()


@pytest.mark.parametrize(("encoder", "k"), [("pseudo_inverse", None), ("top_k", 3), ("least_squares", 3)])
def test_leading_axes_and_jit_change_nothing(x, key, encoder, k):
    random = fit_random_directions(x, 20, encoder, k, key=key)
    whole = jax.jit(lambda random, x: random(x))(random, x.reshape(2, 20, 8))
    np.testing.assert_allclose(whole.reshape(40, 8), random(x), atol=1e-5)
    np.testing.assert_allclose(random(x[0]), random(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "k", "message"),
    [
        ("pseudo_inverse", 3, r"the codes of a pseudo-inverse are dense; leave k=3 out"),
        ("top_k", None, r"encoder 'top_k' needs k from 1 to 20, got None"),
        ("least_squares", 9, r"encoder 'least_squares' needs k from 1 to 8, got 9"),
    ],
)
def test_a_k_that_does_not_fit_is_named(x, key, encoder, k, message):
    with pytest.raises(InputError, match=message):
        fit_random_directions(x, 20, encoder, k, key=key)


def test_no_directions_are_refused(x, key):
    with pytest.raises(InputError, match=r"d_sae must be at least 1, got 0"):
        fit_random_directions(x, 0, key=key)
