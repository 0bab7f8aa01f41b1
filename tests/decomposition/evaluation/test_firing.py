"""Codes against planted codes: closed forms on orthogonal directions, numpy's correlations elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation import match_codes, match_firing
from tests.decomposition.evaluation.toy import aligned_toy, random_toy

N, D = 200, 5
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def planted():
    """Orthogonal directions of length 2, sparse codes between 0.5 and 1.5."""
    rng = np.random.default_rng(0)
    directions = 2 * np.linalg.qr(rng.normal(size=(D, D)))[0]
    codes = (rng.uniform(size=(N, D)) < 0.3) * rng.uniform(0.5, 1.5, size=(N, D))
    return directions.astype(np.float32), codes.astype(np.float32), (codes @ directions).astype(np.float32)


def test_the_true_dictionary_scores_one(planted):
    directions, codes, x = planted
    toy = aligned_toy(directions / 2, threshold=1e-3)
    found = match_codes(toy, x, codes, key=KEY, batch_size=64)
    np.testing.assert_array_equal(found.latents, np.arange(D))
    assert found.mcc.value == pytest.approx(1, abs=1e-3)
    assert found.mcc_null < 0.3
    got = match_firing(toy, x, codes, found.latents, true_directions=directions, key=KEY, batch_size=64)
    assert (got.precision.value, got.recall.value, got.f1.value) == (1, 1, 1)
    assert got.f1_null == pytest.approx(0.3, abs=0.07)
    assert got.shrinkage is not None
    assert got.shrinkage.value == pytest.approx(1, abs=2e-3)


def test_a_threshold_costs_recall_and_shrinks(planted):
    directions, codes, x = planted
    # codes come out in units of length: 2 z − 2
    toy = aligned_toy(directions / 2, threshold=2.0)
    got = match_firing(toy, x, codes, np.arange(D), true_directions=directions, key=KEY)
    big = codes > 1
    assert got.precision.value == 1
    np.testing.assert_allclose(got.recalls, (big.sum(0) / (codes > 0).sum(0)), rtol=1e-5)
    np.testing.assert_allclose(got.f1s, 2 * big.sum(0) / (big.sum(0) + (codes > 0).sum(0)), rtol=1e-5)
    z = codes.astype(np.float64)
    slopes = ((2 * z - 2) * 2 * z * big).sum(0) / (4 * z**2 * big).sum(0)
    np.testing.assert_allclose(got.slopes, slopes, rtol=1e-3)
    assert got.shrinkage is not None
    assert got.shrinkage.value == pytest.approx(slopes.mean(), rel=1e-3)


def test_correlations_are_numpys(planted):
    _, codes, x = planted
    toy = random_toy(2, D, 7)
    got = match_codes(toy, x, codes, key=KEY, batch_size=64)
    ours = np.asarray(toy.encode(jnp.asarray(x)))
    alive = ours.std(0) > 0
    full = np.zeros((D, 7))
    full[:, alive] = np.corrcoef(codes.T, ours.T[alive])[:D, D:]
    np.testing.assert_allclose(got.correlations, full[np.arange(D), got.latents], atol=1e-4)
    assert got.mcc.value == pytest.approx(np.abs(got.correlations).mean(), rel=1e-5)


def test_a_feature_without_a_partner_scores_zero(planted):
    directions, codes, x = planted
    toy = aligned_toy(directions / 2, threshold=1e-3)
    latents = np.array([0, 1, 2, 3, -1])
    got = match_firing(toy, x, codes, latents, key=KEY)
    assert got.f1s.tolist() == [1, 1, 1, 1, 0]
    assert got.recall.value == pytest.approx(0.8)


def test_rows_and_features_must_match(planted):
    directions, codes, x = planted
    toy = aligned_toy(directions)
    with pytest.raises(InputError, match="200 rows for 199"):
        match_codes(toy, x[:-1], codes, key=KEY)
    with pytest.raises(InputError, match="5 features need one latent each"):
        match_firing(toy, x, codes, np.arange(4), key=KEY)
