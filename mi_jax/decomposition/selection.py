"""Exact selection of the largest pre-activations, per token or over a batch, with static shapes and no host sync.

A group's maximum bounds its members: the k largest of a row lie in the k groups of largest maximum. So the search runs
over group maxima, and then over the members of the chosen groups: 1/8 of the comparisons, and the maxima are one
vectorised pass. Pre-activations come as products and a bias, which is added wherever one is read: their sum is an array
of the same size, and writing it takes a tenth of the time of the products.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

GROUP = 16
# rows whose maxima are found at once on a CPU
ROWS_AT_ONCE = 512
# numbers that are counted in one sum
COUNTED = 1024
# rows are searched in so many parts on a CPU, side by side, for XLA runs a search on one core
PARTS = 2
# of flat positions in 32 bits
LARGEST = 2**31 - 1


class _Groups:
    """Pre-activations h + Σ offsets in groups of `GROUP` latents: member i of group j of n is latent i · n + j."""

    def __init__(self, h: Float[Array, "token d_sae"], *offsets: Float[Array, " d_sae"] | None):
        self.n = h.shape[1] // GROUP
        self.h = h.reshape(-1, GROUP, self.n)
        self.offsets = [offset.reshape(GROUP, self.n) for offset in offsets if offset is not None]

    def maxima(self) -> Float[Array, "token group"]:
        """The largest of every group."""

        def of_rows(h, offsets):
            # XLA's reduction over an axis in the middle is slower on a CPU, much so where it adds a bias
            members = (_plus(h[:, i], (offset[None, i] for offset in offsets)) for i in range(GROUP))
            return functools.reduce(jnp.maximum, members)

        def in_turn(h, offsets):
            if h.shape[0] <= ROWS_AT_ONCE or h.shape[0] % ROWS_AT_ONCE:
                return of_rows(h, offsets)
            # outside a loop XLA computes them again in all that reads them
            blocks = h.reshape(-1, ROWS_AT_ONCE, *h.shape[1:])
            return lax.map(lambda rows: of_rows(rows, offsets), blocks).reshape(-1, h.shape[-1])

        def at_once(h, offsets):
            return _plus(h, (offset[None] for offset in offsets)).max(1)

        return lax.platform_dependent(self.h, self.offsets, cpu=in_turn, default=at_once)

    def of_rows(self, first: int, groups: Int[Array, "row chosen"]) -> Float[Array, "row member chosen"]:
        """Members of some groups of every row from the `first` on."""
        rows = first + jnp.arange(groups.shape[0], dtype=jnp.int32)
        members = self.h[rows[:, None, None], jnp.arange(GROUP, dtype=jnp.int32)[None, :, None], groups[:, None, :]]
        return _plus(members, (offset.T[groups].transpose(0, 2, 1) for offset in self.offsets))

    def of_pairs(self, tokens: Int[Array, " pair"], groups: Int[Array, " pair"]) -> Float[Array, "pair member"]:
        """Members of one group of one row, for every pair."""
        return _plus(self.h[tokens, :, groups], (offset.T[groups] for offset in self.offsets))

    def latents(self, groups: Int[Array, " pair"]) -> Int[Array, "pair member"]:
        """The members' latents."""
        return groups[:, None] + jnp.arange(GROUP, dtype=jnp.int32)[None, :] * self.n


def _plus(h: Array, offsets: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, offsets, h)


def _sum(h: Array, *offsets: Array | None) -> Array:
    return _plus(h, (offset[None, :] for offset in offsets if offset is not None))


def top_k(
    h: Float[Array, "token d_sae"], k: int, bias: Float[Array, " d_sae"] | None = None
) -> tuple[Float[Array, "token k"], Int[Array, "token k"]]:
    """The k largest of every row of h + bias, largest first, and where they are.

    `jax.lax.top_k` but for the order of equals.
    """
    n_tokens, d_sae = h.shape
    n_groups = d_sae // GROUP
    if d_sae % GROUP or n_groups < 2 * k:
        values, latents = lax.top_k(_sum(h, bias), k)
        return values, latents
    grouped = _Groups(h, bias)
    maxima = grouped.maxima()

    def in_parts(n_parts):
        size = n_tokens // n_parts if n_tokens % n_parts == 0 else n_tokens
        found = [_top_k(grouped, maxima[i : i + size], i, k) for i in range(0, n_tokens, size)]
        return jnp.concatenate([values for values, _ in found]), jnp.concatenate([latents for _, latents in found])

    return lax.platform_dependent(cpu=lambda: in_parts(PARTS), default=lambda: in_parts(1))


def _top_k(
    grouped: _Groups, maxima: Float[Array, "row group"], first: int, k: int
) -> tuple[Float[Array, "row k"], Int[Array, "row k"]]:
    """The k largest of the rows from `first` on, and where they are."""
    maxima, chosen = lax.top_k(maxima, k)
    members = grouped.of_rows(first, chosen)
    # The maxima come first, in order: few others are larger than the last of them, and a partial sort that has seen the
    # k largest early passes over the rest.
    largest = jnp.argmax(members, axis=1)
    others = jnp.where(jnp.arange(GROUP)[None, :, None] == largest[:, None, :], -jnp.inf, members)
    values, place = lax.top_k(jnp.concatenate([maxima, others.reshape(-1, GROUP * k)], axis=1), k)
    row, column = place // k, place % k
    member = jnp.where(row == 0, jnp.take_along_axis(largest, column, axis=1), row - 1)
    return values, member * grouped.n + jnp.take_along_axis(chosen, column, axis=1)


def kth_largest(x: Float[Array, "..."], count: int | Int[Array, ""]) -> Float[Array, ""]:
    """The `count`-th largest of numbers that are not negative, or 0 where there are fewer; exact, by bisection on bits.

    Each of the passes, one per bit, is one sum of comparisons, so the same program is global on a mesh.
    """
    wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
    whole = jnp.int64 if wide.dtype == jnp.float64 else jnp.int32
    n_bits = 8 * wide.dtype.itemsize - 1
    # the bits of floats that are not negative are ordered as the floats are
    bits = lax.bitcast_convert_type(wide, whole)

    wanted = jnp.asarray(count).astype(jnp.uint32)
    # in rows that are neither short nor too long to be counted in float32
    rows = bits.reshape(-1, COUNTED) if bits.size % COUNTED == 0 else bits.reshape(1, -1)

    def narrow(i, found):
        guess = found | (jnp.ones((), whole) << (n_bits - 1 - i).astype(whole))
        return jnp.where(_count(rows >= guess) >= wanted, guess, found)

    found = lax.fori_loop(0, n_bits, narrow, jnp.zeros((), whole))
    return lax.bitcast_convert_type(found, wide.dtype).astype(x.dtype)


def _count(mask: Bool[Array, "row column"]) -> UInt[Array, ""]:
    """How many are true. A matrix product counts twice as fast as a sum of integers, but no row beyond 2²⁴."""
    if mask.shape[1] >= 2**24:
        return mask.sum(dtype=jnp.uint32)
    return (mask.astype(jnp.float32) @ jnp.ones(mask.shape[1], jnp.float32)).astype(jnp.uint32).sum(dtype=jnp.uint32)


def places(
    first: Bool[Array, "row column"], size: int, then: Bool[Array, "row column"] | None = None
) -> tuple[Int[Array, " size"], Int[Array, " size"], Int[Array, ""]]:
    """Rows and columns of the true entries of `first`, then of `then` as far as there is room; and how many there are.

    Empty places hold the number of rows, and column 0. The two masks must not overlap. What does not fit is not
    counted: the number is exact up to `size`, and larger beyond.
    """
    ranks, total = _ranks(first, size)
    slot = jnp.where(first, ranks, size)
    if then is not None:
        later, more = _ranks(then, size)
        slot = jnp.where(then, total + later, slot)
        total = total + more
    # a rank beyond `size` has no place and is dropped
    slot, (n_rows, n_columns) = slot.reshape(-1), first.shape

    def held(values, empty):
        return jnp.full(size, empty, jnp.int32).at[slot].set(values.reshape(-1), mode="drop")

    if first.size <= LARGEST:
        flat = held(jnp.arange(first.size, dtype=jnp.int32), first.size)
        return flat // n_columns, flat % n_columns, total
    # flat positions would not fit into 32 bits
    rows, columns = (lax.broadcasted_iota(jnp.int32, first.shape, axis) for axis in (0, 1))
    return held(rows, n_rows), held(columns, 0), total


def _ranks(mask: Array, size: int) -> tuple[Array, Array]:
    """How many true entries come before each, in flat order; and how many there are in all."""
    within = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    rows = within[:, -1]
    if mask.size <= LARGEST:
        upto = jnp.cumsum(rows, dtype=jnp.int32)
    else:
        # more entries than 32 bits count: sums stop where there is no place left
        upto = lax.associative_scan(lambda a, b: jnp.minimum(a + b, size + 1), jnp.minimum(rows, size + 1))
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), upto[:-1]])
    return before[:, None] + within - 1, upto[-1]


def largest_of_batch(
    h: Float[Array, "token d_sae"], count: int, bias: Float[Array, " d_sae"] | None = None
) -> tuple[Float[Array, " pair"], Int[Array, " pair"], Int[Array, " pair"]]:
    """The `count` largest positive entries of the whole batch of h + bias: values, tokens, latents, in no order.

    Where fewer are positive the rest has value 0. Exact: a token may have any number of them.
    """
    n_tokens, d_sae = h.shape
    count = min(count, h.size)
    n_groups = d_sae // GROUP
    if d_sae % GROUP or n_groups * n_tokens < count:
        members = jax.nn.relu(_sum(h, bias))
        tokens, latents = _largest(members, count)
        return members[tokens, latents], tokens, latents
    grouped = _Groups(h, bias)
    token, group = _largest(jax.nn.relu(grouped.maxima()), count)
    members = jax.nn.relu(grouped.of_pairs(token, group))
    pair, member = _largest(members, count)
    # tokens and latents apart: a flat position need not fit into 32 bits
    return members[pair, member], token[pair], grouped.latents(group)[pair, member]


def _largest(x: Float[Array, "row column"], count: int) -> tuple[Int[Array, " {count}"], Int[Array, " {count}"]]:
    """Rows and columns of the `count` largest of numbers that are not negative."""
    least = kth_largest(x, count)
    rows, columns, _ = places(x > least, count, x == least)
    return rows, columns


def all_above(
    h: Float[Array, "token d_sae"],
    capacity: int,
    bias: Float[Array, " d_sae"] | None = None,
    bound: Float[Array, " d_sae"] | None = None,
) -> tuple[Int[Array, " pair"], Int[Array, " pair"], Bool[Array, ""]]:
    """Tokens and latents of every h + bias over its bound, or over 0; and whether all fit into `capacity` places.

    Empty places hold token 0 and latent `d_sae`.
    """
    n_tokens, d_sae = h.shape
    n_groups = d_sae // GROUP
    below = None if bound is None else -bound
    if d_sae % GROUP or n_groups * n_tokens <= capacity:
        tokens, latents, total = places(_sum(h, bias, below) > 0, capacity)
        fits, empty = total <= capacity, tokens >= n_tokens
    else:
        grouped = _Groups(h, bias, below)
        token, group, n_chosen = places(grouped.maxima() > 0, capacity)
        real, token = token < n_tokens, jnp.minimum(token, n_tokens - 1)
        members = (grouped.of_pairs(token, group) > 0) & real[:, None]
        pair, member, total = places(members, capacity)
        fits, empty = (total <= capacity) & (n_chosen <= capacity), pair >= capacity
        pair = jnp.minimum(pair, capacity - 1)
        tokens, latents = token[pair], grouped.latents(group)[pair, member]
    return jnp.where(empty, 0, tokens), jnp.where(empty, d_sae, latents), fits
