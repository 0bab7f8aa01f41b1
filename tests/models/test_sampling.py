"""The choice of a token: which tokens can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.models.sampling import choose

LOGITS = jnp.log(jnp.array([[0.4, 0.05, 0.3, 0.05, 0.2]]))
ONE = jnp.asarray(1.0)


def draws(logits, n=4000, *, temperature=ONE, top_k=None, top_p=None):
    """The share of every token among n draws."""
    rows = jnp.broadcast_to(logits, (n, logits.shape[-1]))
    found = choose(rows, temperature=temperature, top_k=top_k, top_p=top_p, key=jax.random.key(3))
    assert found.dtype == jnp.int32
    return np.bincount(found, minlength=logits.shape[-1]) / n


def check_shares(found, expected, n=4000):
    """Within five standard errors, and nothing where nothing can be."""
    expected = np.asarray(expected, np.float64) / np.sum(expected)
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all(), (found, expected)


def test_without_a_temperature_the_most_likely_token_is_taken():
    rows = jnp.array([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    for key in (None, jax.random.key(0)):
        assert choose(rows, temperature=None, top_k=1, top_p=None, key=key).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_divides_the_logits(temperature):
    found = draws(LOGITS, temperature=jnp.asarray(temperature))
    check_shares(found, np.exp(np.asarray(LOGITS[0], np.float64) / temperature))


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [1, 0, 0, 0, 0]), (2, [0.4, 0, 0.3, 0, 0]), (3, [0.4, 0, 0.3, 0, 0.2]), (99, [0.4, 0.05, 0.3, 0.05, 0.2])],
)
def test_top_k_leaves_the_largest(top_k, expected):
    check_shares(draws(LOGITS, top_k=top_k), expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [1, 0, 0, 0, 0]),
        (0.39, [1, 0, 0, 0, 0]),
        # 0.4 does not reach 0.5 and 0.4 + 0.3 does
        (0.5, [0.4, 0, 0.3, 0, 0]),
        (0.75, [0.4, 0, 0.3, 0, 0.2]),
        (1.0, [0.4, 0.05, 0.3, 0.05, 0.2]),
    ],
)
def test_top_p_leaves_the_fewest_that_reach_it(top_p, expected):
    check_shares(draws(LOGITS, top_p=jnp.asarray(top_p)), expected)


def test_top_p_counts_what_temperature_and_top_k_have_left():
    # 0.16 : 0.09 : 0.04 at half the temperature, 0.64 : 0.36 after top_k=2
    half = jnp.asarray(0.5)
    check_shares(draws(LOGITS, temperature=half, top_k=2, top_p=jnp.asarray(0.6)), [1, 0, 0, 0, 0])
    check_shares(draws(LOGITS, temperature=half, top_k=2, top_p=jnp.asarray(0.7)), [0.16, 0, 0.09, 0, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), top_k=st.integers(1, 7), top_p=st.floats(0.05, 1.0))
def test_what_is_drawn_is_in_both_sets_for_any_logits(seed, top_k, top_p):
    rows = 2 * jax.random.normal(jax.random.key(seed), (16, 7))
    key = jax.random.key(seed + 1)
    found = np.asarray(choose(rows, temperature=ONE, top_k=top_k, top_p=jnp.asarray(top_p), key=key))
    for row, token in zip(np.asarray(rows, np.float64), found, strict=True):
        order = np.argsort(-row)
        kept = order[:top_k]
        probabilities = np.exp(row[kept]) / np.exp(row[kept]).sum()
        n = 1 + int((np.cumsum(probabilities)[:-1] < top_p - 1e-6).sum())
        assert token in kept[: max(n, 1) + int(top_p > 0.999)]


def test_rows_are_drawn_independently_and_a_key_gives_the_same_again():
    rows = jnp.zeros((64, 10))
    one, two, other = (choose(rows, temperature=ONE, top_k=None, top_p=None, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert len(set(one.tolist())) > 3
