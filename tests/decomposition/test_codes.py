"""Products with sparse codes and their gradients against dense ones; what accelerators run against what a CPU runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition import codes, scatter
from mi_jax.decomposition.activations import TopK, top
from mi_jax.decomposition.codes import Pairs, Placed, attach, decode

TOKENS, WIDTH, D_SAE, K = 12, 7, 20, 4


@pytest.fixture
def arrays():
    """In double precision, so that a difference is a mistake and not rounding."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"x": (TOKENS, WIDTH), "c": (WIDTH,), "w_enc": (D_SAE, WIDTH), "w_dec": (D_SAE, WIDTH), "b": (D_SAE,)}
        yield {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def placed(h):
    return Placed(jax.lax.top_k(h, K)[1])


def pairs(h):
    """The same places in another order, with an empty pair."""
    latents = placed(h).latents
    tokens = jnp.broadcast_to(jnp.arange(TOKENS)[:, None], latents.shape)
    order = np.random.default_rng(1).permutation(TOKENS * K)
    return Pairs(
        jnp.append(tokens.reshape(-1)[order], 0), jnp.append(latents.reshape(-1)[order], D_SAE), n_tokens=TOKENS
    )


def at(h, where):
    if isinstance(where, Placed):
        return jnp.take_along_axis(h, where.latents, 1)
    return h.at[where.tokens, where.latents].get(mode="fill", fill_value=0.0)


def sparse_loss(p, make):
    h = (p["x"] - p["c"][None, :]) @ p["w_enc"].T + p["b"][None, :]
    where = jax.lax.stop_gradient(make(h))
    values = attach(jax.lax.stop_gradient(at(h, where)), where, p["x"], p["c"], p["w_enc"], p["b"])
    return jnp.sum(jnp.sin(decode(jax.nn.relu(values), where, p["w_dec"]) - p["x"]))


def dense_loss(p):
    h = (p["x"] - p["c"][None, :]) @ p["w_enc"].T + p["b"][None, :]
    kept = h >= jax.lax.top_k(h, K)[0][:, -1:]
    return jnp.sum(jnp.sin(jnp.where(kept, jax.nn.relu(h), 0.0) @ p["w_dec"] - p["x"]))


def assert_close(got, want):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-12 * float(jnp.abs(want[name]).max()), err_msg=name)


@pytest.mark.parametrize("make", [placed, pairs])
def test_gradients_equal_dense_autodiff(arrays, make):
    value, grads = jax.jit(jax.value_and_grad(lambda p: sparse_loss(p, make)))(arrays)
    want_value, want = jax.jit(jax.value_and_grad(dense_loss))(arrays)
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    assert_close(grads, want)


@pytest.mark.parametrize("make", [placed, pairs])
def test_vmap_equals_loop(arrays, make):
    stacked = {name: jnp.stack([a, -a, a[::-1]]) for name, a in arrays.items()}
    grads = jax.jit(jax.vmap(jax.grad(lambda p: sparse_loss(p, make))))(stacked)
    dense = jax.jit(jax.grad(dense_loss))
    for i in range(3):
        one = {name: a[i] for name, a in stacked.items()}
        assert_close({name: g[i] for name, g in grads.items()}, dense(one))


@pytest.mark.parametrize("make", [placed, pairs])
def test_scatter_of_more_places_than_are_sorted_together(arrays, make, monkeypatch):
    h = arrays["x"] @ arrays["w_enc"].T
    where = make(h)
    want = jnp.zeros((TOKENS, D_SAE)).at[jnp.arange(TOKENS)[:, None], placed(h).latents].set(1.0).T @ arrays["x"]
    monkeypatch.setattr(scatter, "SORT_KEYS", 8 * (D_SAE + 1))
    values = (where.latents < D_SAE).astype(jnp.float64)
    got = jax.jit(lambda v: where.scatter(v, arrays["x"], D_SAE))(values)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_scatter_adds_what_repeats_and_drops_what_is_empty():
    values, latents = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0, 2], [2, 2]])
    rows = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    want = np.array([[1.0, 10.0], [0.0, 0.0], [2 + 6 + 8, 20 + 60 + 80]])
    np.testing.assert_array_equal(Placed(latents).scatter(values, rows, 3), want)
    listed = Pairs(jnp.array([0, 0, 1, 1, 1]), jnp.array([0, 2, 2, 2, 3]), n_tokens=2)
    np.testing.assert_array_equal(listed.scatter(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), rows, 3), want)


@pytest.mark.parametrize("fused", [2, 3, 32])
def test_what_an_accelerator_runs_gives_what_a_cpu_runs(monkeypatch, fused):
    rng = np.random.default_rng(2)
    latents = jnp.asarray(rng.integers(0, 6, (5, 3)))
    values, rows, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 3), (5, 4), (6, 4)))
    tokens = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 3)).reshape(-1)
    monkeypatch.setattr(codes, "PLACES_FUSED", fused)

    def products():
        for where, v in ((Placed(latents), values), (Pairs(tokens, latents.reshape(-1), 5), values.reshape(-1))):
            yield where.combine(v, weights)
            yield where.dot(rows, weights)
            yield where.scatter(v, rows, 6)

    cpu = list(products())
    monkeypatch.setattr(codes.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    for a, b in zip(cpu, products(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_accelerator_chooses_as_a_cpu_does(monkeypatch):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((8, 4), (48, 4))))
    activation = TopK(3)
    cpu = activation.choose(x, w, jnp.zeros(48))
    monkeypatch.setattr(top, "TOKENS_AT_ONCE", 2)
    monkeypatch.setattr(top, "HELD_AT_ONCE", 4 * 48)
    for platform in ("cpu", "default"):
        monkeypatch.setattr(top.lax, "platform_dependent", lambda *args, platform=platform, **by: by[platform](*args))
        chosen = activation.choose(x, w, jnp.zeros(48))
        np.testing.assert_array_equal(chosen.where.latents, cpu.where.latents)
        np.testing.assert_allclose(chosen.h, cpu.h, rtol=1e-6)


def test_dense_and_fired():
    where = Pairs(jnp.array([0, 1, 1, 0]), jnp.array([2, 0, 2, 3]), n_tokens=2)
    values = jnp.array([5.0, 6.0, 0.0, 0.0])
    np.testing.assert_array_equal(codes.dense(values, where, 3), [[0, 0, 5], [6, 0, 0]])
    np.testing.assert_array_equal(codes.fired(values, where, 3), [1, 0, 1])
