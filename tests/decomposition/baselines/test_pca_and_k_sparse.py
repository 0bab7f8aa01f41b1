"""Principal components against a singular value decomposition, and k codes of them against every other choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines import PCA, KSparse, fit_pca
from mi_jax.decomposition.evaluation import Reconstructor


@pytest.fixture(scope="module")
def x():
    k_x, k_mix = jax.random.split(jax.random.key(0))
    return jax.random.normal(k_x, (200, 6)) @ jax.random.normal(k_mix, (6, 6)) + 3.0


def test_the_residual_is_what_the_other_singular_values_hold(x):
    for n in (1, 4, 6):
        pca = fit_pca(x, n)
        singular = np.linalg.svd(np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(0), compute_uv=False)
        np.testing.assert_allclose(((x - pca(x)) ** 2).sum(), (singular[n:] ** 2).sum(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(pca.basis @ pca.basis.T, np.eye(n), atol=1e-5)
    assert isinstance(pca, Reconstructor)


def test_no_other_k_components_reconstruct_better(x):
    pca = fit_pca(x, 5)
    sparse = KSparse(pca, k=2)
    codes = sparse.encode(x)
    assert ((codes != 0).sum(1) == 2).all()
    error = ((x - sparse(x)) ** 2).sum(1)
    dense = pca.encode(x)
    for pair in itertools.combinations(range(5), 2):
        kept = jnp.zeros_like(dense).at[:, pair].set(dense[:, pair])
        assert (error <= ((x - pca.decode(kept)) ** 2).sum(1) + 1e-4).all()


def test_ties_leave_k_codes():
    pca = PCA(mean=jnp.zeros(3), basis=jnp.eye(3))
    np.testing.assert_array_equal(KSparse(pca, k=2).encode(jnp.array([-1.0, 1.0, -1.0])), [-1, 1, 0])


def test_leading_axes_and_jit_change_nothing(x):
    sparse = KSparse(fit_pca(x, 5), k=3)
    whole = jax.jit(lambda sparse, x: sparse(x))(sparse, x.reshape(4, 50, 6))
    np.testing.assert_allclose(whole.reshape(200, 6), jnp.stack([sparse(row) for row in x[:200]]), atol=1e-5)


@pytest.mark.parametrize("n", [0, 7])
def test_a_count_that_does_not_fit_is_named(x, n):
    with pytest.raises(InputError, match=rf"n_components must be from 1 to d_model=6, got {n}"):
        fit_pca(x, n)


def test_bad_activations_and_k_are_refused(x):
    with pytest.raises(InputError, match=r"2 of 200 activations are NaN or infinite, the first of them is number 7"):
        fit_pca(x.at[7, 1].set(jnp.nan).at[9].set(jnp.inf), 2)
    with pytest.raises(InputError, match=r"a fit needs 2 activations or more, got 1"):
        fit_pca(x[:1], 2)
    with pytest.raises(InputError, match=r"k must be at least 1, got 0"):
        KSparse(fit_pca(x, 2), k=0)
    with pytest.raises(InputError, match=r"k=3 of the 2 codes of a PCA"):
        KSparse(fit_pca(x, 2), k=3)(x)
