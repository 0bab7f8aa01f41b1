"""The rule by hand, and sequences against the probabilities that they should be drawn with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.validation.attribute_task import AttributeTaskConfig, attribute_task

CONFIG = AttributeTaskConfig(n_tokens=40, n_attributes=6, mean_attributes=1.2, n_roots=4, n_pos=7)


@pytest.fixture(scope="module")
def task():
    return attribute_task(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def tokens(task):
    return jax.jit(lambda task, key: task.sequences(4000, key=key))(task, jax.random.key(1))


def by_hand(task, row):
    """The logits after every position of one sequence, from the rule as it is stated."""
    has, logits = np.asarray(task.attributes) > 0, np.zeros((len(row), CONFIG.n_tokens))
    for t, token in enumerate(row):
        for w in range(CONFIG.n_tokens):
            for a in np.flatnonzero(has[w]):
                current = has[token, task.now[a]]
                two_back = t >= 2 and has[row[t - 2], task.before[a]]
                logits[t, w] += CONFIG.strength * (current != two_back) - CONFIG.cost
    return logits


def test_probabilities_are_those_of_the_rule(task, tokens):
    for row in np.asarray(tokens[:3]):
        logits = by_hand(task, row)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(np.exp(task.log_probabilities(jnp.asarray(row)[None])[0]), p, rtol=1e-4)


def test_sequences_are_drawn_with_these_probabilities(task, tokens):
    log_p = np.asarray(task.log_probabilities(tokens), np.float64)[:, :-1]
    p, following = np.exp(log_p), np.asarray(tokens)[:, 1:]
    drawn = np.take_along_axis(log_p, following[:, :, None], axis=-1)[:, :, 0]
    entropy = -(p * log_p).sum(-1)
    surprise = -drawn - entropy
    assert abs(surprise.mean()) < 5 * surprise.std() / np.sqrt(surprise.size)
    # and so is every attribute at every position, whatever came before
    attributes = np.asarray(task.attributes, np.float64)
    off = attributes[following] - p @ attributes
    assert (np.abs(off.mean(0)) < 5 * off.std(0) / np.sqrt(len(off))).all()
    first = np.bincount(np.asarray(tokens)[:, 0], minlength=CONFIG.n_tokens) / len(tokens)
    start = np.exp(-CONFIG.cost * attributes.sum(1))
    start /= start.sum()
    assert (np.abs(first - start) < 5 * np.sqrt(start / len(tokens))).all()


def test_features_are_the_attributes_of_this_token_and_the_last(task, tokens):
    features = np.asarray(task.features(tokens[:2]))
    assert features.shape == (2, 7, task.n_features)
    has = np.asarray(task.attributes)
    for i, row in enumerate(np.asarray(tokens[:2])):
        for t, token in enumerate(row):
            last = has[row[t - 1]] if t else np.zeros(6)
            np.testing.assert_array_equal(features[i, t], np.concatenate([has[token], last]))


def test_every_attribute_speaks_for_one_now_and_one_later(task):
    assert sorted(task.now.tolist()) == sorted(task.before.tolist()) == list(range(6))


def test_what_has_no_rule_is_refused():
    with pytest.raises(InputError, match=r"2 tokens, 3 attributes and 4 positions or more; got 40, 2 and 7"):
        AttributeTaskConfig(n_tokens=40, n_attributes=2, n_pos=7)
    with pytest.raises(InputError, match=r"with mean_attributes as their mean_l0: .* got mean_l0=9"):
        AttributeTaskConfig(mean_attributes=9.0)
    with pytest.raises(InputError, match=r"of 10 tokens none has attribute \d+; more tokens"):
        attribute_task(AttributeTaskConfig(n_tokens=10), key=jax.random.key(0))
