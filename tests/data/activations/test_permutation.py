"""The permutation: a bijection for every size, the same on device and host, and as random as a shuffle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mi_jax.core.errors import InputError
from mi_jax.data.activations.permutation import permute, permute_host


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**31 - 1))
def test_bijection(n, seed):
    out = permute_host(np.arange(n), n, key=jax.random.key(seed))
    np.testing.assert_array_equal(np.sort(out), np.arange(n))


def test_device_equals_host_for_traced_sizes_in_one_program():
    program = jax.jit(permute)
    index = jnp.arange(70, dtype=jnp.int32)
    for n in (70, 71, 128, 129, 1000, 2**20 + 1, 2**31 - 1):
        key = jax.random.key(n % 1000)
        out = program(index, jnp.asarray(n, jnp.int32), key=key)
        np.testing.assert_array_equal(out, permute_host(np.arange(70), n, key=key))
    assert program._cache_size() == 1


def test_device_covers_small_sizes_and_clips_what_is_outside(key):
    program = jax.jit(permute)
    index = jnp.arange(-3, 40, dtype=jnp.int32)
    for n in range(1, 37):
        out = np.asarray(program(index, jnp.asarray(n, jnp.int32), key=key))
        np.testing.assert_array_equal(np.sort(out[3 : 3 + n]), np.arange(n))
        assert (out[:3] == out[3]).all()
        assert (out[3 + n :] == out[2 + n]).all()


@pytest.mark.parametrize("n", [3, 5, 8, 13])
def test_places_and_pairs_are_uniform(n):
    n_keys = 10_000
    keys = jax.random.split(jax.random.key(1), n_keys)
    index = jnp.arange(n, dtype=jnp.int32)
    out = np.asarray(jax.jit(jax.vmap(lambda key: permute(index, n, key=key)))(keys))
    places = np.stack([np.bincount(out[:, i], minlength=n) for i in range(n)])
    # rows and columns of the table of counts both have their sums given
    statistic = ((places - n_keys / n) ** 2).sum() / (n_keys / n)
    assert stats.chi2.sf(statistic, (n - 1) ** 2) > 1e-3
    pairs = np.bincount(out[:, 0] * n + out[:, 1], minlength=n * n).reshape(n, n)
    assert not pairs.diagonal().any()
    assert stats.chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-3


def test_large_permutation_has_no_serial_correlation(key):
    n = 100_000
    out = permute_host(np.arange(n), n, key=key).astype(float)
    # the correlation of n independent pairs has standard deviation n^-1/2
    assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 4 / n**0.5
    fixed = (out == np.arange(n)).sum()
    assert fixed < 8, "a random permutation has one fixed point on average"


def test_64_bits(key):
    n = 2**61 + 12_345
    index = np.arange(n - 500, n)
    out = permute_host(index, n, key=key)
    assert len(set(out.tolist())) == 500
    assert 0 <= out.min() <= out.max() < n
    assert out.max() > 2**60


def test_other_key_other_order(key):
    first, second = (permute_host(np.arange(1000), 1000, key=k) for k in jax.random.split(key))
    assert (first == second).sum() < 15


def test_bad_input(key):
    with pytest.raises(InputError, match=r"n=0 things; n is from 1 to 2147483647"):
        permute(jnp.arange(3), 0, key=key)
    with pytest.raises(InputError, match=r"n is from 1 to 4611686018427387904"):
        permute_host(np.arange(3), 2**63, key=key)
    with pytest.raises(InputError, match=r"in \[0, 10\); got 0 to 10"):
        permute_host(np.arange(11), 10, key=key)
