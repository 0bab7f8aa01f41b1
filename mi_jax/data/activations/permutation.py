"""Permutations that are functions: element i of a shuffle of n things, without the shuffle.

A Feistel network over Z_a × Z_b, where a is a power of two near √n and b = ⌈n/a⌉, permutes [0, a·b); where it leaves
[0, n) it is applied again (cycle walking), which keeps it a bijection on [0, n). As a·b exceeds n by less than a, this
is rare. Nothing is stored, so a seek costs as much as a step.

Source: Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", §3 and §4.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from mi_jax.core.errors import InputError

# with 8 the pairs of a permutation of 5 or 8 things are not equally likely; with 16 no test tells (n = 3 to 24)
_ROUNDS = 16


def permute(index: Int[Array, "*shape"], n: int | Int[Array, ""], *, key: PRNGKeyArray) -> Int[Array, "*shape"]:
    """Where each index goes under the permutation of [0, n) that `key` stands for; on device.

    Args:
      index: in [0, n); others are moved to the nearest end.
      n: how many there are, from 1 to 2³¹ − 1; it may be traced.
      key: of the permutation.

    Example:
      `jax.jit(permute)(jnp.arange(10), 10, key=jax.random.key(0))` is a shuffle of 0–9.
    """
    if isinstance(n, int):
        _check_size(n, 2**31 - 1)
    size = jnp.asarray(n, jnp.int32)
    last = (size - 1).astype(jnp.uint32)
    low_bits = (33 - jax.lax.clz(last)) // 2
    n_high = (last >> low_bits) + 1
    keys = _round_keys(key)

    def walked(x: Array) -> Array:
        return jnp.where(x > last, _network(x, low_bits, n_high, keys), x)

    start = jnp.clip(index.astype(jnp.int32), 0, size - 1).astype(jnp.uint32)
    out = jax.lax.while_loop(lambda x: jnp.any(x > last), walked, _network(start, low_bits, n_high, keys))
    return out.astype(index.dtype)


def permute_host(index: Int[np.ndarray, "*shape"] | int, n: int, *, key: PRNGKeyArray) -> Int[np.ndarray, "*shape"]:
    """The same permutation in numpy, in 64 bits, for n up to 2⁶²; equal to `permute` where that one reaches.

    Raises:
      InputError: n out of range, or an index outside [0, n).
    """
    _check_size(n, 2**62)
    index = np.asarray(index, np.int64)
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise InputError(f"an index to permute is in [0, {n}); got {index.min()} to {index.max()}")
    low_bits = np.uint64(((n - 1).bit_length() + 1) // 2)
    n_high = np.uint64(((n - 1) >> int(low_bits)) + 1)
    keys = np.asarray(_round_keys(key)).astype(np.uint64)
    out = _network(index.reshape(-1).astype(np.uint64), low_bits, n_high, keys)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _network(out[outside], low_bits, n_high, keys)
    return out.astype(np.int64).reshape(index.shape)


def _round_keys(key: PRNGKeyArray) -> UInt32[Array, " round"]:
    return jax.random.bits(key, (_ROUNDS,), jnp.uint32)


def _network(x: Any, low_bits: Any, n_high: Any, keys: Any) -> Any:
    """The Feistel network, in uint32 on device and in uint64 in numpy: every half fits 32 bits."""
    one = x.dtype.type(1)
    mask = (one << low_bits) - one
    low, high = x & mask, x >> low_bits
    for number in range(0, _ROUNDS, 2):
        low = (low + _hash(high ^ keys[number])) & mask
        high = (high + _hash(low ^ keys[number + 1]) % n_high) % n_high
    return (high << low_bits) | low


def _hash(x: Any) -> Any:
    """A bijective mixing of 32 bits (multiply and xor-shift; the constants are those of "lowbias32", C. Wellons)."""
    kind = x.dtype.type
    whole = kind(0xFFFFFFFF)
    x = (x ^ (x >> kind(16))) * kind(0x7FEB352D) & whole
    x = (x ^ (x >> kind(15))) * kind(0x846CA68B) & whole
    return x ^ (x >> kind(16))


def _check_size(n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise InputError(f"a permutation of n={n} things; n is from 1 to {most}")
