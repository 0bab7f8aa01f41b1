"""Synthetic superposition: frequencies, trees, co-firing, amplitudes and noise against what the config asks for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.core.errors import InputError
from mi_jax.validation.superposition import SuperpositionConfig, superposition

CONFIG = SuperpositionConfig(n_features=40, d_model=12, mean_l0=5.0, n_roots=8, branching=3)
N = 20_000


def draw(config, seed=0):
    truth = superposition(config, key=jax.random.key(1))
    return truth, jax.jit(lambda truth, key: truth.sample(N, key=key))(truth, jax.random.key(seed))


def deviations(fires, p):
    """By how many standard deviations of a binomial the counts are off."""
    return np.abs(np.asarray(fires, np.float64).mean(0) - p) / np.sqrt(p * (1 - p) / N)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_roots": None, "correlation": 0.6, "n_factors": 5},
        {"correlation": 0.6, "correlation_structure": "low_rank", "n_factors": 3},
    ],
)
def test_frequencies_follow_zipf_and_no_child_fires_alone(change):
    config = dataclasses.replace(CONFIG, **change)
    truth, sample = draw(config)
    fires = np.asarray(sample.codes > 0)
    p = np.asarray(truth.frequencies, np.float64)
    np.testing.assert_allclose(truth.mean_l0, 5.0, rtol=1e-5)
    free = p < config.max_frequency - 1e-6
    np.testing.assert_allclose((p * np.arange(1, 41))[free], p[-1] * 40, rtol=1e-5)
    # of 40 counts, none is five standard deviations off
    assert deviations(fires, p).max() < 5
    parents = np.asarray(truth.parents)
    children = np.flatnonzero(parents >= 0)
    assert len(children) == 40 - config.roots
    assert not (fires[:, children] & ~fires[:, parents[children]]).any()
    if len(children):
        assert (np.bincount(parents[children]) <= config.branching).all()


def test_trees_have_more_than_one_level_and_siblings_fire_on_their_own():
    truth, sample = draw(CONFIG)
    parents, fires = np.asarray(truth.parents), np.asarray(sample.codes > 0)
    # 8 roots, 24 children, 8 grandchildren
    np.testing.assert_array_equal(parents[:8], -1)
    np.testing.assert_array_equal(parents[8:], np.repeat(np.arange(11), 3)[:32])
    siblings = fires[fires[:, 0]][:, 8:10]
    p = np.asarray(truth.frequencies)[8:10] / truth.frequencies[0]
    both, expected = siblings.all(1).mean(), p.prod()
    assert abs(both - expected) < 5 * np.sqrt(expected / len(siblings))


@pytest.mark.parametrize("structure", ["blocks", "low_rank"])
def test_roots_fire_together_as_their_normal_variables_correlate(structure):
    config = SuperpositionConfig(
        n_features=6, d_model=4, mean_l0=1.2, n_roots=6, zipf_exponent=0.5, correlation=0.7,
        correlation_structure=structure, n_factors=2,
    )  # fmt: skip
    truth, sample = draw(config)
    fires, p = np.asarray(sample.codes > 0), np.asarray(truth.frequencies, np.float64)
    correlations = np.asarray(truth.loadings @ truth.loadings.T, np.float64)
    if structure == "blocks":
        wanted = 0.7 * np.kron(np.eye(2), np.ones((3, 3)))
    else:
        cosines = np.asarray(truth.loadings, np.float64) / 0.7**0.5
        np.testing.assert_allclose(np.linalg.norm(cosines, axis=1), 1, rtol=1e-5)
        wanted = 0.7 * cosines @ cosines.T
    np.testing.assert_allclose(correlations, wanted, atol=1e-6)
    for i in range(6):
        for j in range(i):
            covariance = np.array([[1, wanted[i, j]], [wanted[i, j], 1]])
            normal = scipy.stats.multivariate_normal(cov=covariance)  # pyright: ignore[reportArgumentType]
            both = normal.cdf(scipy.stats.norm.ppf(p[[i, j]]))
            assert deviations(fires[:, i] & fires[:, j], both) < 5


@pytest.mark.parametrize("amplitude", ["uniform", "lognormal"])
def test_amplitudes_are_distributed_as_asked(amplitude):
    config = dataclasses.replace(CONFIG, amplitude=amplitude, amplitude_spread=0.4)
    codes = np.asarray(draw(config)[1].codes)
    values = codes[codes > 0]
    wanted = scipy.stats.uniform(0.6, 0.8) if amplitude == "uniform" else scipy.stats.lognorm(0.4)
    assert scipy.stats.kstest(values, wanted.cdf).pvalue > 1e-4
    ratio = {"uniform": 0.6 / np.sqrt(wanted.moment(2)), "lognormal": 0.0}[amplitude]
    np.testing.assert_allclose(config.z_ratio, ratio, rtol=1e-6)
    assert dataclasses.replace(config, amplitude_spread=0.0).z_ratio == 1


def test_activations_are_the_codes_directions_and_noise():
    truth, sample = draw(CONFIG)
    np.testing.assert_allclose(jnp.linalg.norm(truth.dictionary, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(sample.x, np.asarray(sample.codes) @ np.asarray(truth.dictionary), atol=1e-5)
    noisy = draw(dataclasses.replace(CONFIG, noise=0.3))[1]
    np.testing.assert_array_equal(noisy.codes, sample.codes)
    noise = np.asarray(noisy.x - sample.x)
    assert scipy.stats.kstest(noise.ravel() / 0.3, scipy.stats.norm.cdf).pvalue > 1e-4
    np.testing.assert_allclose(np.cov(noise.T), 0.09 * np.eye(12), atol=0.005)


def test_a_batch_depends_on_seed_and_step_alone():
    truth = superposition(CONFIG, key=jax.random.key(1))
    batch = jax.jit(lambda t: truth.sample(16, key=jax.random.fold_in(jax.random.key(2), t)))
    third = batch(jnp.asarray(3, jnp.int32))
    batch(jnp.asarray(4, jnp.int32))
    for again in (batch(jnp.asarray(3, jnp.int32)), truth.sample(16, key=jax.random.fold_in(jax.random.key(2), 3))):
        np.testing.assert_array_equal(third.codes, again.codes)
        np.testing.assert_allclose(third.x, again.x, atol=1e-6)
    assert (third.codes != batch(jnp.asarray(4, jnp.int32)).codes).any()


def test_coherence_and_the_one_step_bound():
    truth = superposition(
        SuperpositionConfig(n_features=2048, d_model=256, amplitude_spread=0.0), key=jax.random.key(0)
    )
    rows = np.asarray(truth.dictionary, np.float64)
    gram = np.abs(rows @ rows.T - np.eye(2048))
    np.testing.assert_allclose(truth.coherence.mutual, gram.max(), rtol=1e-4)
    s, d, n = truth.config.one_step_sparsity, 256, 2048

    def interference(s):
        return np.sqrt(s / d * 2 * np.log(n - s)) + np.sqrt((s - 1) / d * 2 * np.log(s))

    assert interference(s) <= 1 < interference(s + 1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from((2, 24)), zipf=st.floats(0, 2), share=st.floats(0.01, 0.99), most=st.floats(0.05, 0.95)
)  # fmt: skip
def test_any_config_that_is_accepted_gives_its_mean_l0(n, zipf, share, most):
    config = SuperpositionConfig(
        n_features=n, d_model=2, mean_l0=share * n * most, zipf_exponent=zipf, max_frequency=most
    )
    p = np.asarray(superposition(config, key=jax.random.key(0)).frequencies)
    np.testing.assert_allclose(p.sum(), config.mean_l0, rtol=1e-4)
    assert (np.diff(p) <= 1e-6).all()
    assert p.max() <= most * (1 + 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_features": 0}, r"n_features must be at least 1, got 0"),
        ({"n_roots": 41}, r"n_roots must be from 1 to n_features=40, or None; got 41"),
        ({"mean_l0": 20.0}, r"fire fewer than 20 at a time; got mean_l0=20.0"),
        ({"correlation": 1.0}, r"correlation is in \[0, 1\)"),
        ({"amplitude_spread": 1.0}, r"amplitude_spread is at least 0, and below 1 where uniform; got 1.0"),
    ],
)
def test_a_config_without_meaning_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_child_as_frequent_as_its_parent_is_refused():
    config = dataclasses.replace(CONFIG, zipf_exponent=0.0)
    with pytest.raises(InputError, match=r"feature 8 fires whenever its parent 0 does: both have frequency 0.125"):
        superposition(config, key=jax.random.key(0))
