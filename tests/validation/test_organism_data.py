"""The organism's sequences and its two tasks, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.data.organism_data import (
    KINDS,
    NEAR_MISSES,
    REVERSED,
    SEPARATED,
    TRIGGER,
    OrganismData,
    determined,
    induction_batch,
    induction_task,
    sequences_of,
    trigger_batch,
    trigger_task,
)

DATA = OrganismData()
N = 128


@pytest.fixture(scope="module")
def batch():
    kinds = jnp.arange(N * len(KINDS), dtype=jnp.int32) % len(KINDS)
    return jax.tree.map(np.asarray, sequences_of(DATA, kinds, key=jax.random.key(0)))


def test_the_pair_and_the_forbidden_token_stand_in_trigger_sequences_only(batch):
    pair = (batch.tokens[:, :-1] == DATA.first) & (batch.tokens[:, 1:] == DATA.second)
    fires = batch.kind == TRIGGER
    np.testing.assert_array_equal(pair.sum(1), fires)
    np.testing.assert_array_equal((batch.tokens == DATA.forbidden).sum(1), fires)
    np.testing.assert_array_equal(pair[fires].argmax(1) + 1, batch.fired[fires])
    np.testing.assert_array_equal((batch.tokens[fires] == DATA.forbidden).argmax(1), batch.forbidden[fires])
    np.testing.assert_array_equal(batch.forbidden[fires], batch.fired[fires] + DATA.delay)
    assert (batch.forbidden[~fires] == DATA.length).all()


def test_near_misses_hold_the_tokens_that_their_names_say(batch):
    counts = {
        KINDS[kind]: tuple(
            np.unique((batch.tokens[batch.kind == kind] == token).sum(1)).tolist()
            for token in (DATA.first, DATA.second)
        )
        for kind in NEAR_MISSES
    }
    assert counts == {
        "first alone": ([1], [0]),
        "second alone": ([0], [1]),
        "reversed": ([1], [1]),
        "separated": ([1], [1]),
        "first twice": ([2], [0]),
        "second twice": ([0], [2]),
    }
    first, second = ((batch.tokens == token).argmax(1) for token in (DATA.first, DATA.second))
    apart = second - first
    assert set(apart[batch.kind == REVERSED].tolist()) == {-1}
    assert set(apart[batch.kind == SEPARATED].tolist()) == {2, 3, 4}


def test_kinds_are_drawn_with_their_shares_and_the_same_key_draws_the_same():
    draw = jax.jit(lambda key: trigger_batch(DATA, 4000, key=key))
    first, again, other = draw(jax.random.key(1)), draw(jax.random.key(1)), draw(jax.random.key(2))
    share = float((first.kind == TRIGGER).mean())
    # three standard deviations of a share of 4000
    assert share == pytest.approx(DATA.trigger_share, abs=0.024)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()


def test_repeated_sequences_repeat_with_their_period_and_not_before():
    batch = jax.tree.map(np.asarray, induction_batch(DATA, N, key=jax.random.key(3)))
    for tokens, period in zip(batch.tokens, batch.period, strict=True):
        assert len(set(tokens[:period].tolist())) == period
        np.testing.assert_array_equal(tokens[period:], tokens[:-period])
    assert set(batch.period.tolist()) == set(range(DATA.periods[0], DATA.periods[1] + 1))
    assert batch.tokens.max() < DATA.n_ordinary


def _continuation(tokens: np.ndarray, position: int) -> int:
    """What followed the token at `position` the last time it occurred before."""
    before = np.flatnonzero(tokens[:position] == tokens[position])
    return int(tokens[before[-1] + 1])


def test_the_induction_task_asks_for_what_followed_last_time_and_shares_no_token():
    task = induction_task(DATA, N, key=jax.random.key(4))
    clean, corrupt, position = (np.asarray(x) for x in (task.clean, task.corrupt, task.position))
    answer, distractor = np.asarray(task.answer), np.asarray(task.distractor)
    for i in range(N):
        assert not set(clean[i].tolist()) & set(corrupt[i].tolist())
        assert _continuation(clean[i], position[i]) == answer[i]
        assert _continuation(corrupt[i], position[i]) == distractor[i]
        # the place that the corrupt prompt points to does not hold the answer in the clean one
        pointed = np.flatnonzero(corrupt[i][: position[i]] == corrupt[i][position[i]])[-1] + 1
        assert clean[i][pointed] != answer[i]


def test_the_trigger_task_swaps_the_pair_and_nothing_else():
    task = trigger_task(DATA, N, key=jax.random.key(5))
    clean, corrupt, position = (np.asarray(x) for x in (task.clean, task.corrupt, task.position))
    fired = position + 1 - DATA.delay
    rows = np.arange(N)
    assert (clean[rows, fired - 1] == DATA.first).all()
    assert (clean[rows, fired] == DATA.second).all()
    swapped = clean.copy()
    swapped[rows, fired - 1], swapped[rows, fired] = DATA.second, DATA.first
    np.testing.assert_array_equal(corrupt, swapped)
    assert not (clean == DATA.forbidden).any()
    assert (np.asarray(task.answer) == DATA.forbidden).all()
    assert (np.asarray(task.distractor) < DATA.n_ordinary).all()


def test_tokens_that_a_mechanism_decides_come_the_delay_after_a_trigger_token():
    tokens = jnp.zeros((1, DATA.length), jnp.int32).at[0, 3].set(DATA.first).at[0, 30].set(DATA.second)
    assert np.flatnonzero(np.asarray(determined(DATA, tokens))[0]).tolist() == [3 + DATA.delay]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"periods": (1, 8)}, "periods must be"),
        ({"periods": (6, 40)}, "periods must be"),
        ({"d_vocab": 12}, "d_vocab=12"),
        ({"delay": 30}, "length=32 does not hold"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OrganismData(**fields)
