"""Rows without weight change nothing, whatever they hold; every row with weight has the same, whatever its batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition import ARCHITECTURES, Objective, TrainConfig, architecture, init, train_step
from mi_jax.decomposition.objective import Coefficients, loss
from mi_jax.decomposition.training import init_state
from mi_jax.decomposition.training.source import filled, normalisation
from tests.decomposition.cases import random_dictionary

D, D_SAE, K, ROWS = 6, 32, 3, 9
DEAD = jnp.asarray(np.arange(D_SAE) % 3 == 0)
VALID = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], bool)
# the others are the same code in other combinations
QUICK = ("batchtopk", "jumprelu")


@functools.partial(jax.jit, static_argnames="objective")
def value_and_grad(dictionary, x, objective, valid):
    coefficients = Coefficients(jnp.asarray(0.3, x.dtype), jnp.asarray(0.7, x.dtype))
    chosen = dictionary.choose(x, valid)

    def of(dictionary):
        return loss(dictionary, x, x, DEAD, objective, coefficients, chosen, valid=valid)

    return jax.value_and_grad(of, has_aux=True, allow_int=True)(dictionary)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_loss_and_gradient_are_those_of_the_valid_rows_alone(name):
    fields = {"n_experts": 4} if name == "switch" else {"max_active": D_SAE} if name == "jumprelu" else {}
    aims = {"k_aux": 4, "aux_coefficient": 0.5, "aux_normalised": True, "target_l0": 5.0}
    config, objective = architecture(name, D, D_SAE, k=K, objective=aims, **fields)
    with jax.enable_x64(True):
        dictionary = random_dictionary(config, dtype=jnp.float64)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(ROWS, D))
        # as an outlier is: far off, and different every time
        x[~VALID] = 50.0 * rng.normal(size=((~VALID).sum(), D))
        whole = value_and_grad(dictionary, jnp.asarray(x), objective, jnp.asarray(VALID))
        alone = value_and_grad(dictionary, jnp.asarray(x[VALID]), objective, None)
        for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), atol=1e-9)


@pytest.fixture(scope="module")
def stepped():
    """Metrics and moments after the first step: of one row alone, and of a batch of 32 in which it alone counts."""
    config, objective = architecture("topk", D, D_SAE, k=K, objective={"auxiliary": "none"})
    train = TrainConfig(steps=10, batch_size=32, decoder="free")
    x = jax.random.normal(jax.random.key(0), (32, D))
    sae = init(config, key=jax.random.key(1))

    def step(x, valid=None):
        state = init_state(sae, config, objective, train)
        state, metrics = train_step(state, x, objective=objective, train=train, valid=valid)
        return metrics, state.optimiser.mu

    return step(x[3:4]), step(x, jnp.arange(32) == 3), x[3], sae


def test_one_row_of_a_batch_moves_the_dictionary_by_its_share(stepped):
    (_, alone), (_, batch), _, _ = stepped
    for got, want in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, want / 32, rtol=1e-5, atol=1e-8)


def test_metrics_are_means_over_the_rows_that_count(stepped):
    (alone, _), (batch, _), row, sae = stepped
    error = float(((row - sae(row[None])[0]) ** 2).sum())
    for name in ("loss", "reconstruction", "l0"):
        assert float(batch[name]) == pytest.approx(float(alone[name]), rel=1e-5), name
    assert float(batch["reconstruction"]) == pytest.approx(error, rel=1e-5)
    assert float(batch["rows"]) == 1
    # rows that are missing count with unit variance per dimension: not 10¹² as of one row about its own mean
    assert float(batch["fvu"]) == pytest.approx(error / (D * 31 / 32), rel=1e-5)


def test_a_batch_without_a_row_changes_no_metric_to_nan():
    config, objective = architecture("batchtopk", D, D_SAE, k=K, objective={"auxiliary": "none"})
    train = TrainConfig(steps=10, batch_size=32)
    state = init_state(init(config, key=jax.random.key(1)), config, objective, train)
    x = jax.random.normal(jax.random.key(0), (32, D))
    before = np.asarray(state.dictionary.w_enc)
    state, metrics = train_step(state, x, objective=objective, train=train, valid=jnp.zeros(32, bool))
    assert all(np.isfinite(value) for value in metrics.values())
    assert float(metrics["l0"]) == float(metrics["rows"]) == 0
    np.testing.assert_array_equal(state.dictionary.w_enc, before)


def test_scale_and_filling_are_of_the_valid_rows():
    x = np.random.default_rng(0).normal(3.0, 2.0, (ROWS, D)).astype(np.float32)
    mean, scale = normalisation(jnp.asarray(x), jnp.asarray(VALID))
    np.testing.assert_allclose(mean, x[VALID].mean(0), rtol=1e-5)
    np.testing.assert_allclose(scale, 1 / np.sqrt(x[VALID].var(0).mean()), rtol=1e-5)
    full = np.asarray(filled(jnp.asarray(x), jnp.asarray(VALID)))
    np.testing.assert_array_equal(full[VALID], x[VALID])
    np.testing.assert_allclose(full[~VALID], np.broadcast_to(x[VALID].mean(0), (3, D)), rtol=1e-5)


def test_quadratic_penalties_have_the_l0_of_the_valid_rows():
    config, objective = architecture("jumprelu_quadratic", D, D_SAE, objective={"target_l0": 5.0})
    assert isinstance(objective, Objective)
    dictionary = random_dictionary(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, D)), jnp.float32)
    (_, parts), _ = value_and_grad(dictionary, x, objective, jnp.asarray(VALID))
    l0 = float((dictionary.encode(x[VALID]) > 0).sum(1).mean())
    assert float(parts.penalty) == pytest.approx((l0 / 5.0 - 1) ** 2, rel=1e-5)
