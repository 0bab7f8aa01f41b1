"""Gradients through the adapters, against finite differences of the same network in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mi_jax as mi
from tests.models.adapters.foreign import FORMS, HIDDEN, LAYERS, X, form, numpy_run


@pytest.fixture(params=FORMS)
def one(request):
    return form(request.param)


def test_gradients_of_an_edits_value_are_finite_differences(one):
    value, direction = jax.random.normal(jax.random.key(3), (2, LAYERS, 2, 5, HIDDEN))

    exact = np.asarray([value, direction], np.float64)

    def loss(value, layer):
        return jnp.square(mi.intervene(one.adapted, mi.add("mlp.pre", value, layer=layer))(X)).sum()

    def step(size, layer):
        def edit(site, at, pre):
            return pre + exact[0, at] + size * exact[1, at] if (site, at) == ("mlp.pre", layer) else pre

        return np.square(numpy_run(one.weights, X, edit)[0]).sum()

    # over the layer's index at once
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(value, jnp.arange(LAYERS, dtype=jnp.int32))
    for layer in range(LAYERS):
        slope = (step(1e-5, layer) - step(-1e-5, layer)) / 2e-5
        np.testing.assert_allclose((gradients[layer] * direction).sum(), slope, rtol=1e-3)
        others = np.delete(np.asarray(gradients[layer]), layer, 0)
        np.testing.assert_array_equal(others, 0)


def test_captures_can_be_differentiated_both_ways(one):
    direction = jax.random.normal(jax.random.key(4), X.shape)

    def hidden(x):
        return mi.capture(one.adapted, "mlp.pre")(x)[1]["mlp.pre"]

    _, tangent = jax.jit(lambda x, d: jax.jvp(hidden, (x,), (d,)))(X, direction)
    exact, way, size = np.asarray(X, np.float64), np.asarray(direction, np.float64), 1e-6
    ahead, behind = (numpy_run(one.weights, exact + s * way)[1]["mlp.pre"] for s in (size, -size))
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * size), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: (hidden(x) * tangent).sum()))(X)
    np.testing.assert_allclose((gradient * direction).sum(), (tangent * tangent).sum(), rtol=1e-4)
