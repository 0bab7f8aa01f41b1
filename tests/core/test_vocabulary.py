"""Tokens outside the vocabulary are refused where they are known and NaN where they are traced, negative ones too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.core.errors import InputError
from mi_jax.core.vocabulary import at_tokens, check_tokens
from mi_jax.data.task import Task
from mi_jax.features import direct_logits
from tests.models.tiny import prompts, tiny


def test_values_of_tokens_and_nan_for_those_that_do_not_exist():
    values = jnp.arange(6.0).reshape(2, 3)
    found = jax.jit(at_tokens)(values, jnp.array([[0, 2, -1], [1, 3, -3]]))
    np.testing.assert_array_equal(found, [[0, 2, np.nan], [4, np.nan, np.nan]])


@pytest.mark.parametrize(("token", "size", "message"), [(-1, 3, "0–2"), (3, 3, "0–2"), (-2, None, "count from 0")])
def test_known_tokens_are_checked(token, size, message):
    with pytest.raises(InputError, match=f"answer holds token {token}; .*{message}"):
        check_tokens("answer", np.array([0, token]), size)
    check_tokens("answer", 2, size)


@pytest.mark.parametrize("kind", ["answer", "distractor"])
def test_a_task_has_no_negative_answer(kind):
    tokens, one = prompts(1), jnp.array([1, 2])
    given = {"answer": one, "distractor": one + 1}
    with pytest.raises(InputError, match=f"task 't': {kind} holds token -1"):
        Task("t", tokens, tokens, tokens >= 0, position=one, **(given | {kind: jnp.array([1, -1])}))
    # save where a set is padded with it
    given = {name: jnp.stack([x, x - 5], 1) for name, x in given.items()}
    weight = {f"{name}_weight": jnp.array([[1.0, 0.0]] * 2) for name in given}
    task = Task("t", tokens, tokens, tokens >= 0, position=one, **given, **weight)
    logits = jax.random.normal(jax.random.key(0), (2, 1, 13))
    np.testing.assert_allclose(
        task.metric(logits), [logits[0, 0, 1] - logits[0, 0, 2], logits[1, 0, 2] - logits[1, 0, 3]]
    )


def test_the_parts_of_a_logit_take_a_number():
    tokens, read = prompts(1), direct_logits(tiny())
    by_number, by_array = (
        read(tokens, answer=5, distractor=np.int32(2)),
        read(tokens, answer=jnp.asarray(5), distractor=2),
    )
    np.testing.assert_array_equal(by_number.logit, by_array.logit)
    logits = tiny()(tokens)
    np.testing.assert_allclose(by_number.logit, logits[..., 5] - logits[..., 2], atol=1e-5)
    for name in ("answer", "distractor"):
        with pytest.raises(InputError, match=f"{name} holds token -1; the vocabulary is 0–12"):
            read(tokens, **({"answer": 5} | {name: -1}))
    traced = jax.jit(lambda answer: read(tokens, answer=answer))(jnp.asarray(-1))
    assert np.isnan(traced.logit).all()
    assert np.isnan(traced.total()).all()
