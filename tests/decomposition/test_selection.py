"""Selections against a sort: any shapes, ties, too few positives, too many for the places."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.decomposition.selection import all_above, kth_largest, largest_of_batch, top_k

# few programs: shapes are drawn from short lists
SHAPES = st.sampled_from([(5, 160), (3, 50), (8, 64)])


def numbers(shape, seed, rounded):
    h = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    # whole numbers make ties
    return np.round(2 * h) if rounded else h


@given(SHAPES, st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 4]))
@settings(max_examples=60, deadline=None)
def test_top_k_is_the_sort(shape, seed, rounded, k):
    h = numbers(shape, seed, rounded)
    values, places = jax.jit(top_k, static_argnums=1)(h, k)
    np.testing.assert_array_equal(values, -np.sort(-h, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(h, np.asarray(places), 1), values)
    assert all(len(set(row)) == k for row in np.asarray(places).tolist())


@given(SHAPES, st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 7, 40]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_largest_of_batch_is_the_sort_of_the_whole_batch(shape, seed, rounded, count, few):
    h = numbers(shape, seed, rounded) - (2.5 if few else 0.0)
    values, tokens, latents = (np.asarray(a) for a in jax.jit(largest_of_batch, static_argnums=1)(h, count))
    want = -np.sort(-np.maximum(h, 0).reshape(-1))[:count]
    np.testing.assert_array_equal(-np.sort(-values), want)
    positive = values > 0
    np.testing.assert_array_equal(h[tokens[positive], latents[positive]], values[positive])
    pairs = list(zip(tokens[positive], latents[positive], strict=True))
    assert len(set(pairs)) == len(pairs)


@given(SHAPES, st.integers(0, 10**6), st.sampled_from([3, 30, 200]))
@settings(max_examples=60, deadline=None)
def test_all_above_finds_all_or_says_that_they_do_not_fit(shape, seed, capacity):
    margin = numbers(shape, seed, False) - 1.0
    tokens, latents, fits = (np.asarray(a) for a in jax.jit(all_above, static_argnums=1)(margin, capacity))
    want = set(zip(*np.nonzero(margin > 0), strict=True))
    real = latents < shape[1]
    if fits:
        assert set(zip(tokens[real], latents[real], strict=True)) == want
        assert real.sum() == len(want)
    else:
        assert len(want) > capacity or shape[1] % 16 == 0
    # a batch with room for every group is never refused
    if capacity >= len(want) and capacity >= min(len(want), shape[0] * shape[1] // 16):
        assert fits


@given(st.lists(st.floats(0, 2**60, width=32, allow_subnormal=False), min_size=1, max_size=30), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_kth_largest_is_exact(values, count):
    padded = np.zeros(30, np.float32)
    padded[: len(values)] = values
    want = np.sort(padded)[::-1][count - 1]
    assert jax.jit(kth_largest)(jnp.asarray(padded), count) == want
