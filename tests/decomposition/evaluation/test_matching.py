"""Matching against brute force over permutations, closed forms, and nulls."""

import itertools

import jax
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.matching import (
    assign,
    at_partner,
    match_directions,
    mean_max_cosine,
    seed_consistency,
)

KEY = jax.random.key(0)


def test_the_assignment_is_the_best_of_all_permutations():
    similarity = np.random.default_rng(0).uniform(size=(4, 5))
    partner = assign(similarity)
    best = max(sum(similarity[i, p[i]] for i in range(4)) for p in itertools.permutations(range(5), 4))
    assert at_partner(similarity, partner).sum() == pytest.approx(best)
    assert len(set(partner.tolist())) == 4


def test_permuted_scaled_and_flipped_directions_are_the_same():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(12, 6))
    order = rng.permutation(12)
    ours = true[order] * rng.choice([-2.0, 0.5], size=(12, 1))
    got = match_directions(ours, true, key=KEY)
    for estimate in (got.mcc, got.mmcs):
        np.testing.assert_allclose([estimate.value, estimate.ci_low, estimate.ci_high], 1, rtol=1e-5)
    assert got.uniqueness == 1
    np.testing.assert_array_equal(order[got.latents], np.arange(12))
    np.testing.assert_array_equal(np.sign(got.cosines), np.sign((ours[got.latents] * true).sum(1)))
    assert got.mcc_null.largest < 0.9
    assert got.mcc_null.mean <= got.mmcs_null.mean


def test_one_direction_found_twice_is_not_unique():
    true = np.eye(3)
    ours = np.array([[1.0, 0, 0], [1.0, 0.1, 0], [0, 0, 1.0]])
    got = match_directions(ours, true, key=KEY)
    assert got.uniqueness == pytest.approx(2 / 3)
    second = 0.1 / np.hypot(1, 0.1)
    assert got.mmcs.value == pytest.approx((1 + second + 1) / 3, rel=1e-5)
    # one to one: (1, second, 1)
    assert got.mcc.value == pytest.approx((2 + second) / 3, rel=1e-5)
    assert mean_max_cosine(ours, true) == pytest.approx(got.mmcs.value)


def test_too_few_latents_leave_features_without_a_partner():
    got = match_directions(np.eye(4)[:2], np.eye(4), key=KEY)
    assert sorted(got.latents.tolist()) == [-1, -1, 0, 1]
    assert got.mcc.value == pytest.approx(0.5)
    assert got.uniqueness == 1


def test_random_null_is_what_random_directions_get():
    rng = np.random.default_rng(3)
    ours, true = rng.normal(size=(2, 40, 10))
    got = match_directions(ours, true, key=KEY, null_draws=4)
    assert got.mcc.value == pytest.approx(got.mcc_null.mean, abs=0.05)
    assert got.mmcs.value == pytest.approx(got.mmcs_null.mean, abs=0.05)


def test_seed_consistency_is_the_mean_over_pairs():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 15, 8))
    got = seed_consistency([a, a[::-1], b], key=KEY)
    assert got.per_pair[0, 1] == pytest.approx(1, rel=1e-5)
    assert got.per_pair[0, 2] == pytest.approx(got.per_pair[1, 2], rel=1e-5)
    assert got.value.value == pytest.approx((1 + 2 * got.per_pair[0, 2]) / 3, rel=1e-5)
    assert got.value.ci_low < got.value.value < got.value.ci_high
    assert got.null.mean == pytest.approx(got.per_pair[0, 2], abs=0.08)


def test_spaces_that_differ_are_refused():
    with pytest.raises(InputError, match="3 and 2 dimensions"):
        match_directions(np.eye(2), np.eye(3), key=KEY)
    with pytest.raises(InputError, match="two or more dictionaries"):
        seed_consistency([np.eye(2)], key=KEY)
