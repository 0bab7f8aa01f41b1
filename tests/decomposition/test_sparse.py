"""k-sparse products and their gradients against dense autodiff; jit and vmap against plain calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition import sparse
from mi_jax.decomposition.sparse import scatter_rows, sparse_decode, topk_encode

BATCH, D_MODEL, D_SAE, K = 12, 7, 20, 4


@pytest.fixture
def arrays():
    """In double precision, so that a difference is a mistake and not rounding."""
    with jax.enable_x64(True):
        yield draw()


def draw():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"x": (BATCH, D_MODEL), "w_enc": (D_SAE, D_MODEL), "w_dec": (D_SAE, D_MODEL), "b_enc": (D_SAE,)}
    return {
        name: jax.random.normal(k, shape, jnp.float64) for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def sparse_loss(p):
    values, indices = topk_encode(p["x"], p["w_enc"], p["b_enc"], K)
    return jnp.sum(jnp.sin(sparse_decode(jax.nn.relu(values), indices, p["w_dec"]) - p["x"]))


def dense_loss(p):
    h = p["x"] @ p["w_enc"].T + p["b_enc"][None, :]
    kept = h >= jax.lax.top_k(h, K)[0][:, -1:]
    return jnp.sum(jnp.sin(jnp.where(kept, jax.nn.relu(h), 0.0) @ p["w_dec"] - p["x"]))


def assert_close(got, want):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-12 * float(jnp.abs(want[name]).max()), err_msg=name)


def test_gradients_equal_dense_autodiff(arrays):
    value, grads = jax.jit(jax.value_and_grad(sparse_loss))(arrays)
    want_value, want = jax.jit(jax.value_and_grad(dense_loss))(arrays)
    np.testing.assert_allclose([value, sparse_loss(arrays)], want_value, rtol=1e-12)
    assert_close(grads, want)


def test_vmap_equals_loop(arrays):
    stacked = {name: jnp.stack([a, -a, a[::-1]]) for name, a in arrays.items()}
    grads = jax.jit(jax.vmap(jax.grad(sparse_loss)))(stacked)
    dense = jax.jit(jax.grad(dense_loss))
    for i in range(3):
        one = {name: a[i] for name, a in stacked.items()}
        assert_close({name: g[i] for name, g in grads.items()}, dense(one))


def test_scatter_adds_what_repeats():
    values, indices = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0, 2], [2, 2]])
    rows = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    want = np.array([[1.0, 10.0], [0.0, 0.0], [2 + 6 + 8, 20 + 60 + 80]])
    np.testing.assert_array_equal(scatter_rows(values, indices, rows, 3), want)
    # what accelerators run
    np.testing.assert_array_equal(sparse._one_scatter(jnp.zeros((3, 2)), values, indices, rows), want)


def test_values_are_the_largest_in_order(arrays):
    values, indices = topk_encode(arrays["x"], arrays["w_enc"], arrays["b_enc"], K)
    h = np.asarray(arrays["x"]) @ np.asarray(arrays["w_enc"]).T + np.asarray(arrays["b_enc"])
    np.testing.assert_allclose(values, -np.sort(-h, axis=1)[:, :K], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.sort(indices, 1), np.sort(np.argsort(-h, 1)[:, :K], 1))
