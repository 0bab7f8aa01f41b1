"""Massive tokens: one definition, whatever the precision and whoever asks."""

import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.data.activations.massive import massive, massive_limit, norms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_norms_and_limit_are_those_of_the_same_numbers_in_double_precision(dtype):
    # squares of which float16 cannot hold one
    x = jnp.asarray(300.0 * np.random.default_rng(0).normal(size=(41, 16))).astype(dtype).at[5].multiply(20)
    exact = np.linalg.norm(np.asarray(x, np.float64), axis=1)
    np.testing.assert_allclose(norms(x), exact, rtol=1e-5)
    assert norms(x).dtype == jnp.float32
    np.testing.assert_array_equal(massive(x, 10.0), exact > 10 * np.median(exact))
    assert np.flatnonzero(massive(x)).tolist() == [5]
    counted = np.arange(41) % 3 == 0
    limit = massive_limit(norms(x), 7.0, jnp.asarray(counted))
    np.testing.assert_allclose(limit, 7 * np.median(exact[counted]), rtol=1e-5)
