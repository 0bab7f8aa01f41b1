"""Logistic regression against scikit-learn, separable and unbalanced data, and the loop over concepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition.evaluation.logistic import balanced, fit_logistic, fit_probes

N, D = 80, 4


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(N, D)) * np.array([1.0, 5.0, 0.1, 1.0]) + 2).astype(np.float32)
    logits = x @ np.array([[1.0, 0.2, 3.0, 0.0], [0.0, -0.3, 0.0, 2.0]]).T + rng.normal(size=(N, 2))
    return jnp.asarray(x), jnp.asarray(logits > np.quantile(logits, 0.7, axis=0))


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_equals_scikit_learn(data, class_weight):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = data
    y = labels[:, 0]
    want = linear_model.LogisticRegression(C=0.5, class_weight=class_weight, tol=1e-8, max_iter=5000).fit(
        np.asarray(x, np.float64), np.asarray(y)
    )
    got = fit_logistic(x, y, balanced(y) if class_weight else None, inverse_penalty=0.5)
    np.testing.assert_allclose(got.weight, want.coef_[0], atol=2e-3)
    np.testing.assert_allclose(got.bias, want.intercept_[0], atol=2e-3)


def test_many_probes_are_the_probes_one_by_one(data):
    x, labels = data
    got = fit_probes(x, labels)
    for c in range(2):
        one = fit_logistic(x, labels[:, c], balanced(labels[:, c]))
        np.testing.assert_allclose(got.weight[c], one.weight, atol=1e-3)
        np.testing.assert_allclose(got.bias[c], one.bias, atol=1e-3)


def test_separable_data_end_at_the_optimum():
    x = jnp.asarray([[-3.0], [-2.0], [2.0], [3.0]])
    y = jnp.asarray([False, False, True, True])
    got = fit_logistic(x, y, inverse_penalty=10.0)

    def objective(w, b):
        z = x[:, 0] * w + b
        return 10 * (jax.nn.softplus(z) - jnp.where(y, z, 0)).sum() + 0.5 * w * w

    slopes = jax.grad(objective, (0, 1))(got.weight[0], got.bias)
    np.testing.assert_allclose(slopes, 0, atol=1e-3)
    assert got.weight[0] > 1


def test_an_absent_column_has_no_weight(data):
    x, labels = data
    got = fit_logistic(x.at[:, 1].set(0), labels[:, 0])
    assert got.weight[1] == 0
