"""Sums of rows by target: the gradients of a dictionary's rows, and decoding of codes that are a list of pairs.

An accelerator adds all rows at once. XLA's CPU scatter is serial and as fast as its memory, so there the additions are
sorted: what goes to one target follows each other while it is in cache, and several such rows are summed, on all cores,
before the scatter sees them. Both gain more than the sort costs.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# On a CPU: pairs whose rows are gathered at once, few enough to stay in a core's cache
PAIRS_AT_ONCE = 128
# how many numbers a sorted integer can be
SORT_KEYS = 2**32
# rows of one target that are summed before the scatter, where a target has so many on average; and the fewest worth it
ROWS_TOGETHER = 8
FEWEST_TOGETHER = 4
# such sums that are computed at once
SUMS_AT_ONCE = 64


def add_rows(
    values: Float[Array, " pair"],
    source: Int[Array, " pair"],
    target: Int[Array, " pair"],
    rows: Float[Array, "source width"],
    size: int,
) -> Float[Array, "{size} width"]:
    """Σ values · rows[source], added to row `target` of `size` rows.

    Args:
      values: what each row is multiplied by.
      source: indices of rows.
      target: where each is added; `size` is nowhere.
      rows: what is added.
      size: number of targets.
    """

    def at_once(values, source, target, rows):
        return zeros(size, values, rows).at[target].add(values[:, None] * rows[source], mode="drop")

    def in_order(values, source, target, rows):
        return add_sorted(values, source, target, rows, size)

    return lax.platform_dependent(values, source, target, rows, cpu=in_order, default=at_once)


def zeros(size: int, values: Array, rows: Array) -> Float[Array, "{size} width"]:
    """Zeros that XLA takes for numbers of their own: two sums that start from one constant would each copy it."""
    zero = jnp.minimum(jnp.abs(values.reshape(-1)[0]), 0.0)
    return jnp.full((size, rows.shape[-1]), zero)


def add_sorted(
    values: Float[Array, " pair"],
    source: Int[Array, " pair"],
    target: Int[Array, " pair"],
    rows: Float[Array, "source width"],
    size: int,
) -> Float[Array, "{size} width"]:
    """`add_rows` as a CPU does it, for targets in any order.

    One integer holds target and place, since XLA sorts one array of integers much faster than two; as many places are
    sorted together as the integer has room for.
    """
    n, limit = target.shape[0], SORT_KEYS // (size + 1)
    chunk = n if n <= limit else 1 << (limit.bit_length() - 1)
    target = jnp.pad(target, (0, -n % chunk), constant_values=size)
    place = jnp.arange(chunk, dtype=jnp.uint32)
    keys = target.reshape(-1, chunk).astype(jnp.uint32) * jnp.uint32(chunk) + place[None, :]
    keys = lax.sort(keys)
    n_chunks = keys.shape[0]
    starts = jnp.arange(n_chunks, dtype=jnp.int32)[:, None]
    order = ((keys % jnp.uint32(chunk)).astype(jnp.int32) + starts * chunk).reshape(-1)
    target = (keys // jnp.uint32(chunk)).astype(jnp.int32)
    together = min(ROWS_TOGETHER, target.size // (n_chunks * size))
    if together >= FEWEST_TOGETHER:
        # a target of one chunk is another than the same of the next
        distinct = (target + starts * (size + 1)).reshape(-1)
        return _summed(values, source, order, distinct, rows, size, n_chunks * (size + 1), together)
    values = values.at[order].get(mode="fill", fill_value=0.0)
    return _in_blocks(values, source.at[order].get(mode="fill", fill_value=0), target.reshape(-1), rows, size)


def _summed(
    values: Array, source: Array, order: Array, target: Array, rows: Array, size: int, n_targets: int, together: int
) -> Array:
    """The same for targets that ascend: up to `together` rows of one target are summed, and then added to it.

    `order` says which pair each target is of; targets are counted modulo size + 1.
    """
    n = order.shape[0]
    first = jnp.searchsorted(target, jnp.arange(n_targets + 1, dtype=jnp.int32)).astype(jnp.int32)
    count = first[1:] - first[:-1]
    n_sums = (count + together - 1) // together
    start = jnp.cumsum(n_sums, dtype=jnp.int32) - n_sums
    # more sums than there can be
    n_places = -(-(n // together + n_targets) // SUMS_AT_ONCE) * SUMS_AT_ONCE
    of = jnp.cumsum(jnp.zeros(n_places, jnp.int32).at[start].add(1, mode="drop"), dtype=jnp.int32) - 1
    done = (jnp.arange(n_places, dtype=jnp.int32) - start[of]) * together
    member = done[:, None] + jnp.arange(together, dtype=jnp.int32)[None, :]
    real = member < count[of][:, None]
    pair = order.at[jnp.where(real, first[of][:, None] + member, n)].get(mode="fill", fill_value=n)
    values = values.at[pair].get(mode="fill", fill_value=0.0)
    source = source.at[pair].get(mode="fill", fill_value=0)
    to = jnp.where(real[:, 0], of % (size + 1), size)

    def add(total, block):
        v, s, t = block
        sums = sum(v[:, i, None] * rows[s[:, i]] for i in range(together))
        return total.at[t].add(sums, mode="drop"), None

    blocks = tuple(a.reshape(-1, SUMS_AT_ONCE, *a.shape[1:]) for a in (values, source, to))
    return lax.scan(add, zeros(size, values, rows), blocks)[0]


def _in_blocks(values: Array, source: Array, target: Array, rows: Array, size: int) -> Array:
    """The same on a CPU, a few pairs at a time, so that the products stay in cache."""
    padding = -values.shape[0] % PAIRS_AT_ONCE
    target = jnp.pad(target, (0, padding), constant_values=size)
    values, source = jnp.pad(values, (0, padding)), jnp.pad(source, (0, padding))

    def add(total, block):
        v, s, t = block
        return total.at[t].add(v[:, None] * rows[s], mode="drop"), None

    blocks = tuple(a.reshape(-1, PAIRS_AT_ONCE) for a in (values, source, target))
    return lax.scan(add, zeros(size, values, rows), blocks)[0]
