"""Selections against a sort: any shapes, ties, too few positives, too many for the places."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.decomposition import selection
from mi_jax.decomposition.selection import all_above, kth_largest, largest_of_batch, places, top_k

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


# tokens × latents is 2³¹, and 2³¹ and a half with latents that make no groups
LARGE = [(16_384, 131_072), (16_384, 196_609)]


@pytest.mark.parametrize("shape", LARGE)
def test_batches_of_more_numbers_than_32_bits_count_are_programs(shape):
    h, bias = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    n = 64 * shape[0]
    tokens, latents, _ = jax.eval_shape(lambda h, b: all_above(h, n, b, b), h, bias)
    assert (tokens.shape, latents.shape, tokens.dtype) == ((n,), (n,), jnp.int32)
    found = jax.eval_shape(lambda h, b: largest_of_batch(h, n, b), h, bias)
    assert [a.shape for a in found] == [(n,)] * 3
    # no position in the whole batch is computed, which would not fit: positions in groups and in pairs do
    assert shape[0] * shape[1] // selection.GROUP <= selection.LARGEST
    for choose in (all_above, largest_of_batch):
        text = str(jax.make_jaxpr(lambda h, b, choose=choose: choose(h, n, b))(h, bias))
        assert not re.search(rf"mul \S+ {shape[1]}:i32", text)


@given(st.integers(0, 10**6), st.sampled_from([1, 5, 12, 40]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_places_of_large_masks_are_those_of_small_ones(seed, size, two):
    rng = np.random.default_rng(seed)
    one = rng.uniform(size=(6, 7)) < 0.3
    other = (rng.uniform(size=(6, 7)) < 0.3) & ~one if two else None
    second = None if other is None else jnp.asarray(other)
    want = np.argwhere(one).tolist() + (np.argwhere(other).tolist() if two else [])
    for limit in (selection.LARGEST, 10):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection, "LARGEST", limit)
            rows, columns, total = (np.asarray(a) for a in places(jnp.asarray(one), size, second))
        assert np.stack([rows, columns], 1).tolist() == (want + [[6, 0]] * size)[:size]
        assert int(total) == len(want) if len(want) <= size else int(total) > size
