"""Activations of half precision train as the same numbers in float32 do: every architecture, every kind of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.decomposition import (
    ARCHITECTURES,
    CrossLayerConfig,
    Objective,
    TrainConfig,
    architecture,
    fit,
    fit_cross_layer,
)

D, D_SAE, K, N = 8, 32, 3, 128
TRAIN = TrainConfig(steps=4, batch_size=32, steps_per_call=4, learning_rate=1e-2, dead_after=1)
# the others run the same code with other losses
QUICK = ("topk", "jumprelu")


def numbers(dtype, width=D, seed=0):
    """Off the origin, and of a size whose squares a float16 cannot sum."""
    x = 90.0 * (1.0 + jax.random.normal(jax.random.key(seed), (N, width)))
    return x.astype(dtype)


def same(half, single):
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(single), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in QUICK and dtype == "bfloat16" else pytest.mark.slow)
        for name in ARCHITECTURES
        for dtype in ("bfloat16", "float16")
    ],
)
def test_every_architecture(name, dtype):
    fields = {"n_experts": 4} if name == "switch" else {}
    config, objective = architecture(name, D, D_SAE, k=K, objective={"k_aux": 4}, **fields)
    x = numbers(dtype)
    half, single = (fit(a, config, objective, TRAIN, key=jax.random.key(1)) for a in (x, x.astype(jnp.float32)))
    same(half, single)
    assert half[0].w_dec.dtype == jnp.float32


@pytest.mark.slow
def test_transcoders_and_crosscoders():
    y = numbers("bfloat16", 2 * D, seed=2)
    for options in ({"transcoder": True, "d_out": 2 * D, "skip": True}, {"n_sites": 2}):
        config, objective = architecture("batchtopk", D, D_SAE, k=K, **options)
        x, targets = numbers("bfloat16"), y if "transcoder" in options else None
        half = fit(x, config, objective, TRAIN, key=jax.random.key(1), targets=targets)
        wide = None if targets is None else targets.astype(jnp.float32)
        same(half, fit(x.astype(jnp.float32), config, objective, TRAIN, key=jax.random.key(1), targets=wide))


@pytest.mark.slow
def test_cross_layer_transcoders():
    x, y = (numbers("bfloat16", 2 * D, seed).reshape(N, 2, D) for seed in (3, 4))
    config = CrossLayerConfig(D, D_SAE, n_layers=2, k=K)
    half, single = (
        fit_cross_layer(*pair, config, Objective(auxiliary="auxk", k_aux=4), TRAIN, key=jax.random.key(1))
        for pair in ((x, y), (x.astype(jnp.float32), y.astype(jnp.float32)))
    )
    same(half, single)
