"""What tells one set of arrays from another: a digest that is the same in every process and however they are sharded.

Arrays are summed up where they lie, in integers, so that neither the order of the sum nor the number of devices
matters, and only two numbers of each come to the host: as dear as reading the arrays once.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32


def fingerprint(tree: PyTree) -> str:
    """A digest of the leaves of a tree: where each is, its type, its shape and its bits.

    Two trees that differ in any bit, or in the order of an array's numbers, differ in it but for one pair in 2⁶⁴. Of
    leaves that are not arrays, numbers and strings count by value and all others by their type.
    """
    digest, sums = hashlib.blake2b(digest_size=16), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array | np.ndarray):
            digest.update(f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}\n".encode())
            sums.append(_sums(leaf))
        else:
            value = repr(leaf) if isinstance(leaf, bool | int | float | complex | str) else type(leaf).__qualname__
            digest.update(f"{jax.tree_util.keystr(path)}: {value}\n".encode())
    for found in jax.device_get(sums):
        digest.update(found.tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(x: Array) -> UInt32[Array, "2"]:
    """Two sums, modulo 2³², of every number's bits mixed with its place."""
    bits = _bits(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        # not a reshape, which would gather a sharded array
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.stack([_mixed(bits, place, seed).sum(dtype=jnp.uint32) for seed in (0x9E3779B1, 0x85EBCA77)])


def _bits(x: Array) -> Array:
    """The bits of every number as uint32, in an axis of their own where they are more."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x).astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)])
    size = x.dtype.itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    return x.astype(jnp.uint32)


def _mixed(bits: Array, place: Array, seed: int) -> Array:
    """A mixing of 32 bits; the constants are those of "lowbias32", C. Wellons."""
    x = bits ^ (place * jnp.uint32(seed) + jnp.uint32(seed >> 1))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
