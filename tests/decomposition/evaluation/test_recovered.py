"""Shares have their end points, and the divergence is that of scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from mi_jax.decomposition.evaluation.recovered import cross_entropy_recovered, kl_divergence, kl_recovered


def test_cross_entropy_recovered_has_its_end_points():
    clean, ablated = jnp.array([2.0, 3.0, 2.5]), jnp.array([6.0, 9.0, 8.0])
    key = jax.random.key(0)
    assert cross_entropy_recovered(clean, clean, ablated, key=key).value == pytest.approx(1)
    assert cross_entropy_recovered(clean, ablated, ablated, key=key).value == pytest.approx(0)
    half = cross_entropy_recovered(clean, (clean + ablated) / 2, ablated, key=key)
    np.testing.assert_allclose([half.value, half.ci_low, half.ci_high], 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="ablation must raise the cross-entropy"):
        cross_entropy_recovered(ablated, clean, clean, key=key)


def test_kl_recovered_has_its_end_points():
    ablated = jnp.array([1.0, 3.0])
    assert kl_recovered(jnp.zeros(2), ablated, key=jax.random.key(0)).value == 1
    assert kl_recovered(ablated, ablated, key=jax.random.key(0)).value == 0
    with pytest.raises(ValueError, match="nothing to recover"):
        kl_recovered(ablated, jnp.zeros(2), key=jax.random.key(0))


def test_kl_is_relative_entropy():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 3, 7)).astype(np.float32)
    want = entropy(softmax(p, -1), softmax(q, -1), axis=-1)
    np.testing.assert_allclose(kl_divergence(jnp.asarray(p), jnp.asarray(q)), want, rtol=1e-4)
