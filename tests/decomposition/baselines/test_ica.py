"""Independent components of mixed sources whose mixture is known, and against scikit-learn's own transform."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import FastICA

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines import fit_ica


@pytest.fixture(scope="module")
def mixed():
    """Four skewed sources, their directions, and their mixture."""
    k_sources, k_mix = jax.random.split(jax.random.key(1))
    sources = jax.random.exponential(k_sources, (4000, 4))
    directions = jax.random.normal(k_mix, (4, 6))
    return sources, directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def test_the_directions_of_the_sources_are_found(mixed, key):
    sources, directions = mixed
    ica = fit_ica(sources @ directions + 2.0, 4, key=key)
    assert ica.converged
    # the longer tail points the right way, so the cosine is signed
    cosines = np.asarray(ica.w_dec @ directions.T)
    order = cosines.argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert cosines.max(1).min() > 0.99
    codes = np.asarray(ica.encode(sources @ directions + 2.0))
    for i, source in enumerate(order):
        assert np.corrcoef(codes[:, i], np.asarray(sources[:, source]))[0, 1] > 0.99


def test_codes_are_those_of_scikit_learn_but_for_scale(mixed, key):
    sources, directions = mixed
    x = sources @ directions
    ica = fit_ica(x, 3, key=key)
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max, np.int32))
    oracle = FastICA(3, whiten="unit-variance", random_state=seed).fit(np.asarray(x, np.float64))
    theirs = oracle.transform(np.asarray(x, np.float64))
    np.testing.assert_allclose(ica(x), oracle.inverse_transform(theirs), atol=1e-4)
    np.testing.assert_allclose(
        np.abs(ica.encode(x)).T / np.linalg.norm(oracle.mixing_, axis=0)[:, None], np.abs(theirs).T, atol=1e-3
    )
    np.testing.assert_allclose(jnp.linalg.norm(ica.w_dec, axis=1), 1, rtol=1e-5)


def test_a_fit_that_did_not_converge_says_so(mixed, key):
    sources, directions = mixed
    assert not fit_ica(sources[:100] @ directions, 4, key=key, max_iter=1).converged


def test_what_cannot_be_fitted_is_refused(mixed, key, monkeypatch):
    x = mixed[0]
    with pytest.raises(InputError, match=r"from 1 to d_model=4 and to n=3, got 4"):
        fit_ica(x[:3], 4, key=key)
    with pytest.raises(InputError, match=r"1 of 4000 activations are NaN or infinite"):
        fit_ica(x.at[3, 0].set(jnp.nan), 2, key=key)
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"FastICA is fitted by scikit-learn, which is missing: pip install"):
        fit_ica(x, 2, key=key)
