"""Orthogonal matching pursuit against the textbook loop, and as an encoder."""

import jax
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.evaluation.pursuit import Pursuit, orthogonal_matching_pursuit


def unit(seed: int, n: int, d: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_pursuit_is_the_textbook_loop():
    rows, k = unit(1, 20, 8), 4
    x = np.random.default_rng(2).normal(size=(6, 8))
    values, indices = orthogonal_matching_pursuit(
        jnp.asarray(rows, jnp.float32), jnp.asarray(x, jnp.float32), k, nonnegative=False
    )
    for b in range(6):
        chosen, residual = [], x[b]
        for _ in range(k):
            along = np.abs(rows @ residual)
            along[chosen] = -1
            chosen.append(int(along.argmax()))
            z = np.linalg.lstsq(rows[chosen].T, x[b], rcond=None)[0]
            residual = x[b] - z @ rows[chosen]
        assert np.asarray(indices[b]).tolist() == chosen
        np.testing.assert_allclose(values[b], z, rtol=1e-3, atol=1e-4)
    jitted = jax.jit(lambda r, x: orthogonal_matching_pursuit(r, x, k))(
        jnp.asarray(rows, jnp.float32), jnp.asarray(x, jnp.float32)
    )
    np.testing.assert_allclose(jitted[0], values, rtol=1e-5)


def test_as_an_encoder_it_finds_the_codes_of_any_norm():
    rng = np.random.default_rng(0)
    # 24 directions in 40 dimensions, two of them at a time: few enough to be found
    w_dec = unit(3, 24, 40) * rng.uniform(0.5, 2, size=(24, 1))
    codes = np.zeros((2, 8, 24))
    for row in codes.reshape(16, 24):
        row[rng.choice(24, 2, replace=False)] = rng.uniform(1, 2, size=2)
    b_dec = rng.normal(size=40)
    x = jnp.asarray(codes @ w_dec + b_dec, jnp.float32)
    pursuit = Pursuit(jnp.asarray(w_dec, jnp.float32), jnp.asarray(b_dec, jnp.float32), 2, nonnegative=True)
    np.testing.assert_allclose(pursuit.encode(x), codes, atol=1e-4)
    np.testing.assert_allclose(pursuit(x), x, atol=1e-4)
