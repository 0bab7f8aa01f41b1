"""The masked loss against a loop over tokens, and batches that depend on the step alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mi_jax.core.errors import InputError
from mi_jax.models.training import Sampled, next_token_loss


def test_the_loss_is_the_mean_over_real_tokens(key):
    k_logits, k_tokens = jax.random.split(key)
    logits = 3 * jax.random.normal(k_logits, (3, 5, 7))
    tokens = jax.random.randint(k_tokens, (3, 5), 0, 7, jnp.int32)
    lengths = [5, 3, 1]
    mask = jnp.arange(5)[None, :] < jnp.array(lengths)[:, None]
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    by_hand = [-log_p[i, t, tokens[i, t + 1]] for i, n in enumerate(lengths) for t in range(n - 1)]
    assert len(by_hand) == 6
    np.testing.assert_allclose(next_token_loss(logits, tokens, mask), np.mean(by_hand), rtol=1e-6)
    every = [-log_p[i, t, tokens[i, t + 1]] for i in range(3) for t in range(4)]
    np.testing.assert_allclose(next_token_loss(logits, tokens), np.mean(every), rtol=1e-6)


def test_padding_has_no_loss_and_no_gradient(key):
    tokens = jnp.array([[1, 2, 3, 0], [4, 0, 0, 0]], jnp.int32)
    mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    logits = jax.random.normal(key, (2, 4, 5)).at[1].set(jnp.nan)
    loss, gradient = jax.value_and_grad(next_token_loss)(logits, tokens, mask)
    assert jnp.isfinite(loss)
    assert jnp.abs(gradient[0, :2]).min() > 0
    assert not jnp.abs(gradient[0, 2:]).any()
    assert next_token_loss(logits[1:], tokens[1:], mask[1:]) == 0


def test_a_batch_is_rows_of_the_data_and_depends_on_the_step_alone(key):
    data = {"x": jnp.arange(40.0).reshape(10, 4), "label": jnp.arange(10, dtype=jnp.int32)}
    batches = Sampled(data, 6, key=key)
    steps = [jnp.asarray(step, jnp.int32) for step in (3, 3, 4)]
    first, again, other = (eqx.filter_jit(batches)(step) for step in steps)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["label"] != other["label"]).any()
    np.testing.assert_array_equal(first["x"], data["x"][first["label"]])
    drawn = jax.vmap(batches)(jnp.arange(300, dtype=jnp.int32))["label"]
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=10)
    # 180 of each on average, with a standard deviation of 13
    assert (abs(counts - 180) < 5 * 13).all()


@pytest.mark.parametrize(("rows", "size"), [((4, 5), 2), ((0, 0), 2), ((4, 4), 0)])
def test_data_without_batches_is_refused(rows, size, key):
    with pytest.raises(InputError, match=r"all arrays have the same number of rows, and a batch has at least one"):
        Sampled([jnp.ones((n, 2)) for n in rows], size, key=key)
