"""Certificates against numpy's pseudo-inverse, and what they promise against solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from mi_jax.core.errors import InputError
from mi_jax.decomposition.evaluation.certificates import certificates, certified_fractions
from mi_jax.decomposition.evaluation.pursuit import orthogonal_matching_pursuit
from tests.decomposition.evaluation.toy import aligned_toy

N, D, S, BATCH = 60, 24, 3, 40


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, D))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    supports = np.stack([rng.choice(N, S, replace=False) for _ in range(BATCH)])
    codes = rng.uniform(0.3, 1, size=(BATCH, S))
    return rows, supports, codes


def test_coefficients_are_those_of_the_pseudo_inverse(problem):
    rows, supports, codes = problem
    signed = codes * np.where(np.arange(BATCH)[:, None] % 2, 1.0, -1.0) * np.array([1.0, -1.0, 1.0])[None, :]
    args = jnp.asarray(rows, jnp.float32), jnp.asarray(supports)
    got = certificates(*args, jnp.asarray(signed, jnp.float32), nonnegative=False)
    positive = certificates(*args, jnp.asarray(codes, jnp.float32))
    for b, support in enumerate(supports):
        inverse = np.linalg.pinv(rows[support].T)
        others = np.delete(np.arange(N), support)
        erc = np.abs(inverse @ rows[others].T).sum(0).max()
        fuchs = np.abs(np.sign(signed[b]) @ inverse @ rows[others].T).max()
        nonnegative = (np.ones(S) @ inverse @ rows[others].T).max()
        assert float(got.erc[b]) == pytest.approx(erc, rel=1e-3)
        assert float(got.fuchs[b]) == pytest.approx(fuchs, rel=1e-3)
        assert float(positive.fuchs[b]) == pytest.approx(nonnegative, rel=1e-3)
        smallest = np.linalg.svd(rows[support])[1][-1]
        assert float(got.smallest_singular_value[b]) == pytest.approx(smallest, rel=1e-3)
    assert (positive.fuchs <= positive.erc + 1e-5).all()


def test_places_without_a_code_are_no_part_of_the_support(problem):
    rows, supports, codes = problem
    directions = jnp.asarray(rows, jnp.float32)
    padded = np.concatenate([supports, np.zeros((BATCH, 2), int)], 1)
    values = np.concatenate([codes, np.zeros((BATCH, 2))], 1)
    got = certificates(directions, jnp.asarray(padded), jnp.asarray(values, jnp.float32))
    want = certificates(directions, jnp.asarray(supports), jnp.asarray(codes, jnp.float32))
    # direction 0 fills the empty places, and is outside of most supports
    np.testing.assert_allclose(got.erc, want.erc, rtol=1e-4)
    np.testing.assert_allclose(got.fuchs, want.fuchs, rtol=1e-4, atol=1e-5)


def test_what_is_certified_is_recovered(problem):
    rows, supports, codes = problem
    directions = jnp.asarray(rows, jnp.float32)
    got = certificates(directions, jnp.asarray(supports), jnp.asarray(codes, jnp.float32))
    x = np.einsum("bk,bkd->bd", codes, rows[supports])
    _, found = orthogonal_matching_pursuit(directions, jnp.asarray(x, jnp.float32), S)
    right = (np.sort(np.asarray(found), 1) == np.sort(supports, 1)).all(1)
    erc, fuchs = np.asarray(got.erc) < 1, np.asarray(got.fuchs) < 1
    assert 0 < erc.sum() < fuchs.sum() < BATCH
    assert right[erc].all()
    for b in np.flatnonzero(fuchs)[:10]:
        solution = linprog(np.ones(N), A_eq=rows.T, b_eq=x[b]).x
        assert set(np.flatnonzero(solution > 1e-6)) == set(supports[b])


def test_dependent_directions_certify_nothing():
    rows = jnp.asarray(np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), jnp.float32)
    got = certificates(rows, jnp.array([[0, 1], [0, 2]]), jnp.ones((2, 2)))
    assert got.smallest_singular_value[0] == 0
    assert jnp.isinf(got.erc[0])
    # the copy of direction 0 is outside: the support cannot be told from its twin
    assert float(got.erc[1]) == pytest.approx(1)


def test_fractions_of_a_dictionary_are_means_over_its_tokens(problem):
    rows, supports, codes = problem
    x = np.einsum("bk,bkd->bd", codes, rows[supports]).astype(np.float32)
    toy = aligned_toy(rows, threshold=0.35)
    z = np.asarray(toy.encode(jnp.asarray(x)))
    most = int((z > 0).sum(1).max())
    blocks = np.arange(BATCH) // 4
    got = certified_fractions(toy, x, blocks=blocks, key=jax.random.key(0), max_active=most, batch_size=16)
    places = np.argsort(-z, 1)[:, :most]
    values = np.take_along_axis(z, places, 1)
    one = certificates(jnp.asarray(rows, jnp.float32), jnp.asarray(places), jnp.asarray(values))
    assert got.erc.value == pytest.approx((np.asarray(one.erc) < 1).mean())
    assert got.fuchs.value == pytest.approx((np.asarray(one.fuchs) < 1).mean())
    assert got.fuchs.ci_low <= got.fuchs.value <= got.fuchs.ci_high
    assert got.fuchs_margin.value == pytest.approx((1 - np.asarray(one.fuchs)).mean(), rel=1e-3)
    assert got.l0 == pytest.approx((z > 0).sum(1).mean())
    with pytest.raises(InputError, match="over max_active=1"):
        certified_fractions(toy, x, blocks=blocks, key=jax.random.key(0), max_active=1)
    with pytest.raises(InputError, match="one block per token"):
        certified_fractions(toy, x, blocks=blocks[1:], key=jax.random.key(0), max_active=most)
