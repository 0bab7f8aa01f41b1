"""Intervals against the standard errors that they must have."""

import jax
import numpy as np
import pytest

from mi_jax.decomposition.evaluation.estimates import bootstrap, bootstrap_mean, bootstrap_ratio, jackknife


def test_bootstrap_interval_of_a_mean_is_its_standard_error():
    sample = 5 + np.random.default_rng(4).normal(size=400)
    for got in (
        bootstrap_mean(sample, key=jax.random.key(5)),
        bootstrap_ratio(sample, np.ones(400), key=jax.random.key(5)),
    ):
        error = sample.std() / 20
        assert got.value == pytest.approx(sample.mean(), rel=1e-6)
        assert got.ci_high - got.ci_low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_bootstrap_is_the_same_in_parts_and_from_the_same_key():
    sums = np.random.default_rng(0).normal(size=(30, 2))
    one, same, other = (
        bootstrap(lambda t: t[..., 0] - t[..., 1], sums, key=jax.random.key(k), resamples=500) for k in (1, 1, 2)
    )
    assert one == same
    assert one.ci_low != other.ci_low


def test_jackknife_of_a_mean_has_the_textbook_error():
    values = np.random.default_rng(1).normal(size=12)
    got = jackknife(lambda total, n: total / n, values, np.ones(12))
    assert got.value == pytest.approx(values.mean())
    assert (got.ci_high - got.value) / 1.96 == pytest.approx(values.std(ddof=1) / 12**0.5)


def test_one_block_is_refused():
    with pytest.raises(ValueError, match="two or more blocks"):
        bootstrap_ratio(np.ones(1), np.ones(1), key=jax.random.key(0))
    with pytest.raises(ValueError, match="two or more groups"):
        jackknife(lambda t: t, np.ones(1))
