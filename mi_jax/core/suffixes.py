"""Suffixes: the positions of many sweep cells that an edit can change, packed into one flat axis.

A cell edited at position p changes positions p and later only. So a sweep over positions has a triangle of (cell,
position) pairs to compute, not a square. Everything but attention treats positions alike and works on the flat axis of
pairs; attention alone looks at rows, one a cell, with the unpatched run's values before the suffix.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Suffixes(eqx.Module):
    """The pairs of a chunk of cells.

    Attributes:
      cell: which cell a pair belongs to.
      pos: its position; a pair that only fills the chunk up repeats the chunk's first.
      pair: for every cell and position its pair, or the number of pairs where the position is before the suffix.
    """

    cell: Int[Array, " pair"]
    pos: Int[Array, " pair"]
    pair: Int[Array, "cell pos"]

    def flat(self, rows: Array) -> Array:
        """`[batch cell pos …]` to `[batch pair …]`."""
        batch, n_cells, n_pos = rows.shape[:3]
        return jnp.take(rows.reshape(batch, n_cells * n_pos, *rows.shape[3:]), self.cell * n_pos + self.pos, axis=1)

    def of(self, x: Array) -> Array:
        """`[batch pos …]`, the same in every cell, to `[batch pair …]`."""
        return jnp.take(x, self.pos, axis=1)

    def rows(self, flat: Array, before: Array | None = None) -> Array:
        """`[batch pair …]` to `[batch cell pos …]`, with `before [batch pos …]` where a position has no pair.

        Without `before`, what stands there is finite and means nothing.
        """
        rows = jnp.take(flat, jnp.minimum(self.pair, flat.shape[1] - 1), axis=1)
        if before is None:
            return rows
        known = jnp.expand_dims(self.pair < flat.shape[1], (0, *range(3, rows.ndim)))
        return jnp.where(known, rows, before[:, None])


class Packing(eqx.Module):
    """Cells in chunks of one number of pairs. The tables of a chunk are made where it is computed, never all at once.

    Attributes:
      lengths: of the suffix of every cell.
      order: the cells by the lengths of their suffixes, longest first.
    """

    lengths: Int[Array, " cell"]
    order: Int[Array, " cell"]
    n_pos: int = eqx.field(static=True)
    n_chunks: int = eqx.field(static=True)
    n_pairs: int = eqx.field(static=True)

    @property
    def size(self) -> int:
        """Cells of a chunk."""
        return -(-self.order.size // self.n_chunks)

    def cells(self, chunk: Int[Array, ""]) -> Int[Array, " row"]:
        """The cells of a chunk, or the number of cells where a place is empty."""
        rank = _rank(chunk, jnp.arange(self.size, dtype=jnp.int32), self.n_chunks)
        return self.order.at[rank].get(mode="fill", fill_value=self.order.size)

    def suffixes(self, cells: Int[Array, " row"]) -> Suffixes:
        """The pairs of a chunk with these cells."""
        lengths = self.lengths.at[cells].get(mode="fill", fill_value=0)
        ends = jnp.cumsum(lengths)
        number = jnp.arange(self.n_pairs, dtype=jnp.int32)
        number = jnp.where(number < ends[-1], number, 0)
        cell = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        first = self.n_pos - lengths
        pos = first[cell] + number - (ends - lengths)[cell]
        places = jnp.arange(self.n_pos, dtype=jnp.int32)[None, :]
        pair = places - (first - (ends - lengths))[:, None]
        return Suffixes(cell, pos, jnp.where(places >= first[:, None], pair, self.n_pairs))

    def slots(self) -> Int[Array, " cell"]:
        """Where every cell stands among the places of all chunks, `[chunk row]` flattened."""
        row, turn = jnp.divmod(jnp.argsort(self.order).astype(jnp.int32), self.n_chunks)
        return jnp.where(row % 2 == 1, self.n_chunks - 1 - turn, turn) * self.size + row


def pack(first: Callable[[Any], Any], n_cells: int, n_pos: int, batch_size: int) -> Packing:
    """Packs cells into chunks of `batch_size`, all with the same number of pairs.

    Args:
      first: from numbers of cells, an array of numpy or jax, to the first positions that their edits can change.
    """
    n_chunks = -(-n_cells // batch_size)
    size = -(-n_cells // n_chunks)
    lengths = -np.sort(first(np.arange(n_cells)) - n_pos)
    # the longest cells go round the chunks forth and back, which evens the sums out
    rank = _rank(np.arange(n_chunks)[:, None], np.arange(size)[None, :], n_chunks)
    pairs = np.append(lengths, np.zeros(rank.max() + 1 - n_cells, int))[rank].sum(1)
    # on the device, and not a constant of the program, which would grow with the prompts
    on_device = n_pos - first(jnp.arange(n_cells, dtype=jnp.int32)).astype(jnp.int32)
    order = jnp.argsort(-on_device).astype(jnp.int32)
    return Packing(on_device, order, n_pos, n_chunks, max(1, int(pairs.max())))


def _rank(chunk: Any, row: Any, n_chunks: int) -> Any:
    """Which of the ordered cells stands in a row of a chunk."""
    return row * n_chunks + chunk + row % 2 * (n_chunks - 1 - 2 * chunk)
