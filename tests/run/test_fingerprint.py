"""A fingerprint is the same in every process and on any mesh, and another for every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.run.fingerprint import fingerprint

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint8", "bool", "complex64")


def numbers(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 60, (8, 4, 2))
    return jnp.asarray(x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_and_place_counts(dtype, mesh):
    x = numbers(dtype)
    own = fingerprint({"w": x})
    assert own == fingerprint({"w": np.asarray(x)})
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model")))
    assert own == fingerprint({"w": spread})
    other = x.at[3, 1, 0].set(~x[3, 1, 0] if dtype == "bool" else jnp.asarray(63).astype(dtype))
    changed = [other, x[::-1], x.reshape(4, 8, 2), x.swapaxes(0, 1)]
    assert len({own, fingerprint({"v": x}), *(fingerprint({"w": y}) for y in changed)}) == 6


def test_types_and_other_leaves_count():
    x = numbers("int32")
    trees = [x, x.astype(jnp.uint32), x.astype(jnp.float32), {"a": 1}, {"a": 2}, {"a": 1.0}, jax.random.key(0)]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_another_process_finds_the_same():
    # written down in another process
    tree = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(5, dtype=jnp.int8), "n": 3}
    assert fingerprint(tree) == "cb9a676d32f4da2b614422913d9e3eec"
