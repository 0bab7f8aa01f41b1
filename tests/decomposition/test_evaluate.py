"""Scores against numpy, and intervals against what a bootstrap must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition.baselines import fit_pca
from mi_jax.decomposition.evaluate import bootstrap_ratio, cross_entropy_recovered, evaluate
from mi_jax.decomposition.sae import SAEConfig, init


@pytest.fixture(scope="module")
def x():
    mix = jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5, 0.25]))
    return jax.random.normal(jax.random.key(0), (90, 5)) @ mix + 3.0


def test_scores_are_their_definitions(x):
    sae = init(SAEConfig(d_model=5, d_sae=12, k=2, k_aux=2), key=jax.random.key(1), mean=x[:40].mean(0))
    mean, blocks = x[:40].mean(0), np.arange(90) // 9
    got = evaluate(sae, x, mean=mean, blocks=blocks, key=jax.random.key(2), batch_size=40)
    guess, codes, centred = np.asarray(sae(x)), np.asarray(sae.encode(x)), np.asarray(x - mean[None, :])
    shift = guess - np.asarray(mean)
    fvu = got.fraction_variance_unexplained
    assert fvu.value == pytest.approx(((np.asarray(x) - guess) ** 2).sum() / (centred**2).sum(), rel=1e-5)
    assert fvu.ci_low < fvu.value < fvu.ci_high
    assert got.l0 == pytest.approx((codes > 0).sum(1).mean())
    assert got.dead_fraction == pytest.approx((codes == 0).all(0).mean())
    np.testing.assert_allclose(got.density, (codes > 0).mean(0))
    assert got.density_histogram.sum() == (codes > 0).any(0).sum()
    norms = np.linalg.norm(shift, axis=1) * np.linalg.norm(centred, axis=1)
    assert got.cosine == pytest.approx(((shift * centred).sum(1) / norms).mean(), rel=1e-4)
    assert got.n_tokens == 90


def test_pca_leaves_the_small_eigenvalues(x):
    pca = fit_pca(x, 2)
    got = evaluate(pca, x, mean=x.mean(0), blocks=np.arange(90), key=jax.random.key(0))
    eigenvalues = np.linalg.eigvalsh(np.cov(np.asarray(x).T))
    want = eigenvalues[:3].sum() / eigenvalues.sum()
    assert got.fraction_variance_unexplained.value == pytest.approx(want, rel=1e-4)
    assert (got.l0, got.dead_fraction) == (2.0, 0.0)
    np.testing.assert_allclose(pca(x[0]), pca(x)[0], rtol=1e-5)


def test_bootstrap_interval_of_a_mean_is_its_standard_error():
    sample = 5 + jax.random.normal(jax.random.key(4), (400,))
    got = bootstrap_ratio(sample, jnp.ones(400), key=jax.random.key(5))
    error = float(sample.std()) / 20
    assert got.value == pytest.approx(float(sample.mean()), rel=1e-5)
    assert got.ci_high - got.ci_low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_cross_entropy_recovered_has_its_end_points():
    clean, ablated = jnp.array([2.0, 3.0, 2.5]), jnp.array([6.0, 9.0, 8.0])
    key = jax.random.key(0)
    assert cross_entropy_recovered(clean, clean, ablated, key=key).value == pytest.approx(1)
    assert cross_entropy_recovered(clean, ablated, ablated, key=key).value == pytest.approx(0)
    half = cross_entropy_recovered(clean, (clean + ablated) / 2, ablated, key=key)
    np.testing.assert_allclose([half.value, half.ci_low, half.ci_high], 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="mean ablation must raise the cross-entropy"):
        cross_entropy_recovered(ablated, clean, clean, key=key)


def test_blocks_of_the_wrong_shape_are_named(x):
    with pytest.raises(ValueError, match=r"shape \(90,\), got \(89,\)"):
        evaluate(fit_pca(x, 2), x, mean=x.mean(0), blocks=np.arange(89), key=jax.random.key(0))
