"""Coherence of frames that are known, and of random directions against a dense numpy oracle."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.decomposition.coherence import coherence, decoder_projection, expected_cosine, welch_bound

GOLDEN = (1 + 5**0.5) / 2
# the six diagonals of an icosahedron: every pair at the same angle, 1/√5
ICOSAHEDRON = np.array(
    [(0, 1, GOLDEN), (0, 1, -GOLDEN), (1, GOLDEN, 0), (1, -GOLDEN, 0), (GOLDEN, 0, 1), (-GOLDEN, 0, 1)]
)


def test_an_equiangular_frame_meets_the_welch_bound():
    got = coherence(ICOSAHEDRON * np.arange(1, 7)[:, None])
    assert got.mutual == pytest.approx(1 / 5**0.5, rel=1e-6)
    assert got.welch == pytest.approx(1 / 5**0.5)
    np.testing.assert_allclose(got.babel, np.arange(1, 6) / 5**0.5, rtol=1e-6)
    np.testing.assert_allclose([got.mean, got.p99], 1 / 5**0.5, rtol=1e-6)


def test_an_orthonormal_basis_has_none():
    got = coherence(np.eye(4))
    assert (got.mutual, got.positive, got.negative, got.mean, got.welch) == (0, 0, 0, 0, 0)
    np.testing.assert_array_equal(got.babel, np.zeros(3))


def test_blocks_of_rows_equal_the_whole_matrix():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(41, 5)) * rng.uniform(0.5, 2, size=(41, 1))
    w[7] = 0
    alive = np.arange(41) != 3
    got = coherence(w, alive=alive, block_size=16, max_order=4)
    kept = np.delete(w, [3, 7], 0)
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    off = unit @ unit.T - np.eye(39)
    assert got.n_directions == 39
    assert got.mutual == pytest.approx(np.abs(off).max(), rel=1e-5)
    assert got.positive == pytest.approx(off.max(), rel=1e-5)
    assert got.negative == pytest.approx(-off.min(), rel=1e-5)
    pairs = np.abs([off[i, j] for i, j in itertools.combinations(range(39), 2)])
    assert got.mean == pytest.approx(pairs.mean(), rel=1e-5)
    assert got.p99 == pytest.approx(np.quantile(np.concatenate([pairs, pairs]), 0.99), rel=1e-4)
    babel = np.cumsum(-np.sort(-np.abs(off), 1), 1).max(0)[:4]
    np.testing.assert_allclose(got.babel, babel, rtol=1e-5)


def test_random_directions_have_the_expected_cosine():
    got = coherence(np.random.default_rng(1).normal(size=(600, 64)))
    assert got.mean == pytest.approx(got.mean_null, rel=0.01)
    assert expected_cosine(64) == pytest.approx(math.sqrt(2 / (math.pi * 64)), rel=0.01)
    # in a plane, the mean of |cos| over a uniform angle
    assert expected_cosine(2) == pytest.approx(2 / math.pi)


def test_welch_is_zero_where_there_is_room():
    assert welch_bound(5, 5) == 0
    assert welch_bound(256, 2048) == pytest.approx(math.sqrt(1792 / (256 * 2047)))


def test_decoder_projection_is_a_rank_among_all_projections():
    rng = np.random.default_rng(2)
    w, b, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 3), (3,), (5, 3)))
    projections = np.sort(((np.asarray(x) - np.asarray(b)) @ np.asarray(w).T).ravel())[::-1]
    assert decoder_projection(w, b, x, 2) == pytest.approx(projections[9], rel=1e-5)
    with pytest.raises(InputError, match="from 1 to d_sae=7"):
        decoder_projection(w, b, x, 8)


def test_one_direction_is_refused():
    with pytest.raises(InputError, match="two or more directions, got 1"):
        coherence(np.eye(3)[:2], alive=np.array([True, False]))
