"""Exact selection of the largest pre-activations, per token or over a batch, with static shapes and no host sync.

A group's maximum bounds its members: the k largest of a row lie in the k groups of largest maximum. So the search runs
over group maxima, and then over the members of the chosen groups: 1/8 of the comparisons, and the maxima are one
vectorised pass.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

GROUP = 16


def top_k(h: Float[Array, "token d_sae"], k: int) -> tuple[Float[Array, "token k"], Int[Array, "token k"]]:
    """The k largest of every row, largest first, and where they are; `jax.lax.top_k` but for the order of equals."""
    n_tokens, d_sae = h.shape
    n_groups = d_sae // GROUP
    if d_sae % GROUP or n_groups < 2 * k:
        values, latents = lax.top_k(h, k)
        return values, latents
    grouped = h.reshape(n_tokens, GROUP, n_groups)
    _, chosen = lax.top_k(grouped.max(1), k)
    members = jnp.take_along_axis(grouped, chosen[:, None, :], axis=2).reshape(n_tokens, GROUP * k)
    values, place = lax.top_k(members, k)
    return values, (place // k) * n_groups + jnp.take_along_axis(chosen, place % k, axis=1)


def kth_largest(x: Float[Array, "..."], count: int | Int[Array, ""]) -> Float[Array, ""]:
    """The `count`-th largest of numbers that are not negative, or 0 where there are fewer; exact, by bisection on bits.

    Each of the passes, one per bit, is one sum of comparisons, so the same program is global on a mesh.
    """
    wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
    whole = jnp.int64 if wide.dtype == jnp.float64 else jnp.int32
    n_bits = 8 * wide.dtype.itemsize - 1
    # the bits of floats that are not negative are ordered as the floats are
    bits = lax.bitcast_convert_type(wide, whole)

    def narrow(i, found):
        guess = found | (jnp.ones((), whole) << (n_bits - 1 - i).astype(whole))
        return jnp.where((bits >= guess).sum(dtype=jnp.int32) >= count, guess, found)

    found = lax.fori_loop(0, n_bits, narrow, jnp.zeros((), whole))
    return lax.bitcast_convert_type(found, wide.dtype).astype(x.dtype)


def places(
    first: Bool[Array, "row column"], size: int, then: Bool[Array, "row column"] | None = None
) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """Flat positions of the true entries of `first`, then of `then` as far as there is room; and how many there are.

    Empty places hold row · column, one past the last position. The two masks must not overlap.
    """
    ranks, total = _ranks(first)
    slot = jnp.where(first, ranks, size)
    if then is not None:
        later, more = _ranks(then)
        slot = jnp.where(then, total + later, slot)
        total = total + more
    n = first.size
    # a rank beyond `size` has no place and is dropped
    found = jnp.full(size, n, jnp.int32).at[slot.reshape(-1)].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return found, total


def _ranks(mask: Array) -> tuple[Array, Array]:
    """How many true entries come before each, in flat order; and how many there are in all."""
    within = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    rows = within[:, -1]
    before = jnp.cumsum(rows, dtype=jnp.int32) - rows
    return before[:, None] + within - 1, rows.sum(dtype=jnp.int32)


def largest_of_batch(
    h: Float[Array, "token d_sae"], count: int
) -> tuple[Float[Array, " pair"], Int[Array, " pair"], Int[Array, " pair"]]:
    """The `count` largest positive entries of the whole batch: values, tokens, latents, in no order.

    Where fewer are positive the rest has value 0. Exact: a token may have any number of them.
    """
    n_tokens, d_sae = h.shape
    count = min(count, h.size)
    n_groups = d_sae // GROUP
    if d_sae % GROUP or n_groups * n_tokens < count:
        members, flat = jax.nn.relu(h), jnp.arange(h.size, dtype=jnp.int32).reshape(h.shape)
    else:
        grouped = h.reshape(n_tokens, GROUP, n_groups)
        maxima = jax.nn.relu(grouped.max(1))
        least = kth_largest(maxima, count)
        groups, _ = places(maxima > least, count, maxima == least)
        token, group = groups // n_groups, groups % n_groups
        # rows are members of one group
        members = jax.nn.relu(grouped[token, :, group])
        flat = (token * d_sae + group)[:, None] + jnp.arange(GROUP, dtype=jnp.int32)[None, :] * n_groups
    least = kth_largest(members, count)
    kept, _ = places(members > least, count, members == least)
    flat = flat.reshape(-1)[kept]
    return members.reshape(-1)[kept], flat // d_sae, flat % d_sae


def all_above(
    margin: Float[Array, "token d_sae"], capacity: int
) -> tuple[Int[Array, " pair"], Int[Array, " pair"], Bool[Array, ""]]:
    """Tokens and latents of every positive margin, and whether all fit into `capacity` places.

    Empty places hold token 0 and latent `d_sae`.
    """
    n_tokens, d_sae = margin.shape
    n_groups = d_sae // GROUP
    if d_sae % GROUP or n_groups * n_tokens <= capacity:
        kept, total = places(margin > 0, capacity)
        fits = total <= capacity
        flat = kept
    else:
        grouped = margin.reshape(n_tokens, GROUP, n_groups)
        groups, n_chosen = places(grouped.max(1) > 0, capacity)
        token, group = jnp.minimum(groups // n_groups, n_tokens - 1), groups % n_groups
        real = groups < n_tokens * n_groups
        members = (grouped[token, :, group] > 0) & real[:, None]
        kept, total = places(members, capacity)
        fits = (total <= capacity) & (n_chosen <= capacity)
        flat = (token * d_sae + group)[:, None] + jnp.arange(GROUP, dtype=jnp.int32)[None, :] * n_groups
        flat = jnp.append(flat.reshape(-1), jnp.int32(n_tokens * d_sae))[kept]
    empty = flat >= n_tokens * d_sae
    return jnp.where(empty, 0, flat // d_sae), jnp.where(empty, d_sae, flat % d_sae), fits
