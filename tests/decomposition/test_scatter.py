"""Sums of rows by target against numpy, for targets that are rare and frequent, sorted together and in chunks."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.decomposition import scatter
from mi_jax.decomposition.scatter import add_sorted

PAIRS, WIDTH, SOURCES = 300, 5, 7


def drawn(seed, size, *, skewed):
    rng = np.random.default_rng(seed)
    values, rows = rng.normal(size=PAIRS), rng.normal(size=(SOURCES, WIDTH))
    # the last target is nowhere, and some have nothing
    share = rng.dirichlet(np.full(size + 1, 0.1 if skewed else 10.0))
    return values, rng.integers(0, SOURCES, PAIRS), rng.choice(size + 1, PAIRS, p=share), rows


def wanted(values, source, target, rows, size):
    total = np.zeros((size + 1, rows.shape[1]))
    np.add.at(total, target, values[:, None] * rows[source])
    return total[:size]


@pytest.fixture(scope="module", autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# targets with 100, 6, 4 and fewer than 4 rows on average
@given(st.sampled_from([3, 50, 75, 200]), st.integers(0, 10**6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_the_sum(size, seed, skewed):
    values, source, target, rows = drawn(seed, size, skewed=skewed)
    want = wanted(values, source, target, rows, size)
    got = jax.jit(add_sorted, static_argnums=4)(values, source.astype(np.int32), target.astype(np.int32), rows, size)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("size", [3, 10])
def test_it_is_the_sum_where_not_all_are_sorted_together(size, monkeypatch):
    values, source, target, rows = drawn(0, size, skewed=True)
    # 64 places at once
    monkeypatch.setattr(scatter, "SORT_KEYS", 64 * (size + 1))
    got = jax.jit(add_sorted, static_argnums=4)(values, source.astype(np.int32), target.astype(np.int32), rows, size)
    np.testing.assert_allclose(got, wanted(values, source, target, rows, size), atol=1e-12)


def test_sums_of_several_problems_at_once():
    problems = [drawn(seed, 20, skewed=False) for seed in range(3)]
    stacked = [np.stack(arrays) for arrays in zip(*problems, strict=True)]
    args = (stacked[0], stacked[1].astype(np.int32), stacked[2].astype(np.int32), stacked[3])
    got = jax.jit(jax.vmap(lambda *a: add_sorted(*a, 20)))(*args)
    for one, problem in zip(got, problems, strict=True):
        np.testing.assert_allclose(one, wanted(*problem, 20), atol=1e-12)
