"""The metric equals numpy's on sets of answers, and a task that makes no sense is refused."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.data.task import Task, TaskWarning, warn_unless_done


def task(**changes) -> Task:
    fields = {
        "clean": jnp.array([[1, 2, 3], [4, 5, 0]], jnp.int32),
        "corrupt": jnp.array([[1, 9, 3], [4, 8, 0]], jnp.int32),
        "mask": jnp.array([[True, True, True], [True, True, False]]),
        "answer": jnp.array([[1, 2], [3, 0]], jnp.int32),
        "distractor": jnp.array([[4, 5, 6], [7, 8, 0]], jnp.int32),
        "position": jnp.array([2, 1], jnp.int32),
        "answer_weight": jnp.array([[0.5, 0.5], [1.0, 0.0]]),
        "distractor_weight": jnp.array([[0.2, 0.3, 0.5], [0.4, 0.6, 0.0]]),
        "roles": {"S": jnp.array([0, 1], jnp.int32)},
        "templates": jnp.array([7, 8], jnp.int32),
    }
    return Task("t", **(fields | changes))


@pytest.fixture
def logits():
    # token 0 stands highest, so that padding of a set would be seen
    made = np.random.default_rng(0).normal(size=(2, 1, 10)).astype(np.float32)
    made[:, :, 0] = 9.0
    return jnp.asarray(made)


def expected(values, made: Task):
    parts = []
    for tokens, weight in ((made.answer, made.answer_weight), (made.distractor, made.distractor_weight)):
        rows = [sum(w * values[i, t] for t, w in zip(*row, strict=True)) for i, row in enumerate(_rows(tokens, weight))]
        parts.append(np.array(rows))
    return parts[0] - parts[1]


def _rows(tokens, weight):
    return [(t, w) for t, w in zip(np.asarray(tokens), np.asarray(weight), strict=True)]


def test_sets_with_weights(logits):
    made, values = task(), np.asarray(logits)[:, 0].astype(np.float64)
    np.testing.assert_allclose(made.metric(logits), expected(values, made), rtol=1e-5)
    other = dataclasses.replace(made, measure="probability-difference")
    probabilities = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    np.testing.assert_allclose(other.metric(logits), expected(probabilities, made), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(eqx.filter_jit(type(other).metric)(other, logits), other.metric(logits), rtol=1e-6)


def test_sets_without_weights_are_means_of_logits_and_sums_of_probabilities(logits):
    made = task(
        answer=jnp.array([[1, 2], [3, 4]], jnp.int32),
        distractor=jnp.array([5, 6], jnp.int32),
        answer_weight=None,
        distractor_weight=None,
    )
    values = np.asarray(logits)[:, 0].astype(np.float64)
    means = np.array([values[0, [1, 2]].mean() - values[0, 5], values[1, [3, 4]].mean() - values[1, 6]])
    np.testing.assert_allclose(made.logit_difference(logits), means, rtol=1e-5)
    p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    sums = np.array([p[0, 1] + p[0, 2], p[1, 3] + p[1, 4]])
    np.testing.assert_allclose(made.answer_probability(logits), sums, rtol=1e-5)
    np.testing.assert_allclose(made.probability_difference(logits), sums - p[[0, 1], [5, 6]], rtol=1e-5)


def test_correct_is_the_best_answer_above_every_distractor():
    made = task()
    logits = jnp.zeros((2, 1, 10)).at[:, :, 0].set(9.0)
    # a padded choice, token 0, counts for neither side
    logits = logits.at[0, 0, 2].set(2.0).at[0, 0, 4].set(1.0).at[1, 0, 3].set(1.0).at[1, 0, 8].set(2.0)
    assert made.correct(logits).tolist() == [True, False]
    assert made.chance == pytest.approx((2 / 5 + 1 / 3) / 2)
    by_mass = dataclasses.replace(made, measure="probability-difference")
    assert by_mass.correct(logits).tolist() == (np.asarray(by_mass.metric(logits)) > 0).tolist()


def test_rows_are_taken_from_every_array():
    made = task(difficulty="hard", dropped="none")
    for rows in (slice(1, 2), np.array([1]), np.array([False, True])):
        one = made[rows]
        assert len(one) == 1
        assert one.roles is not None
        assert (one.roles["S"].tolist(), one.templates.tolist()) == ([1], [8])
        assert (one.difficulty, one.dropped, one.measure) == ("hard", "none", "logit-difference")
        np.testing.assert_array_equal(one.answer_weight, made.answer_weight[1:])


def test_a_task_is_made_within_jit():
    @jax.jit
    def metric(position, logits):
        return task(position=position).metric(logits)

    assert metric(jnp.array([2, 1], jnp.int32), jnp.ones((2, 1, 10))).shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": jnp.array([2, 2], jnp.int32)}, "prompt 1 has 2 tokens and position 2"),
        ({"position": jnp.array([-1, 1], jnp.int32)}, "prompt 0 has 3 tokens and position -1"),
        ({"mask": jnp.array([[True] * 3, [False, True, True]])}, "padded on the right"),
        ({"measure": "kl"}, "no measure 'kl'; there are 'logit-difference'"),
        ({"answer_weight": jnp.ones((2, 3))}, r"answer has shape \(2, 2\) and its weights have \(2, 3\)"),
        ({"answer": jnp.zeros((2, 0), jnp.int32), "answer_weight": None}, "answer has shape"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        unchecked(**changes)


def test_prompts_of_different_length_or_none_are_refused():
    with pytest.raises(InputError, match="each pair needs the same number of tokens"):
        unchecked(corrupt=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(InputError, match="has 2 pairs, and none is left"):
        task()[:0]
    with pytest.raises(InputError, match="has no prompts; give at least one pair"):
        unchecked(**{name: jnp.zeros((0, 3), jnp.int32) for name in ("clean", "corrupt", "mask")})


def unchecked(**changes) -> None:
    """The constructor's own checks, which users have without those of types and shapes that tests add."""
    made = object.__new__(Task)
    for name, value in (vars(task()) | changes).items():
        object.__setattr__(made, name, value)
    made.__check_init__()


def test_pairs_are_taken_by_number_and_a_task_ends():
    made = task()
    assert [one.answer.tolist() for one in made] == [made.answer[:1].tolist(), made.answer[1:].tolist()]
    assert made[-1].position.tolist() == [1] == made[np.array([False, True])].position.tolist()
    assert made[jnp.array([1, 0, -1])].position.tolist() == [1, 2, 1]
    assert eqx.filter_jit(lambda t, i: t[i])(made, jnp.array([1])).position.tolist() == [1]


@pytest.mark.parametrize(
    "rows", [2, -3, np.array([0, 2]), jnp.array([-3]), np.array([True]), np.array([True, False, True])], ids=str
)
def test_pairs_that_are_not_there_are_refused(rows):
    with pytest.raises(InputError, match=r"task 't' has 2 pairs \(0–1\)"):
        task()[rows]


def test_a_token_below_zero_is_no_answer():
    """JAX would count it from the end of the vocabulary; where a set is padded, it has no weight."""
    for kind in ("answer", "distractor"):
        with pytest.raises(InputError, match=f"{kind} holds token -1; tokens count from 0"):
            task(**{kind: jnp.array([3, -1], jnp.int32), f"{kind}_weight": None})
    padded = task(answer=jnp.array([[1, 2], [3, -1]], jnp.int32))
    assert len(padded) == 2


def test_a_task_that_is_not_done_is_a_warning(recwarn):
    warn_unless_done("t", 1.0, 0.5)
    assert not recwarn
    for clean, corrupt in ((0.5, 1.0), (1.0, 1.0), (float("nan"), 0.0)):
        with pytest.warns(TaskWarning, match=f"does not do task 't': its metric is {clean:.4g} on the clean prompts"):
            warn_unless_done("t", clean, corrupt)
