"""Suffixes: the positions of many sweep cells that an edit can change, packed into one flat axis.

A cell edited at position p changes positions p and later only. So a sweep over positions has a triangle of (cell,
position) pairs to compute, not a square. Everything but attention treats positions alike and works on the flat axis of
pairs; attention alone looks at rows, one a cell, with the unpatched run's values before the suffix.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Suffixes(eqx.Module):
    """The pairs of a chunk of cells, or of all chunks with a leading `chunk` axis.

    Attributes:
      cell: which cell a pair belongs to.
      pos: its position; a pair that only fills the chunk up repeats the chunk's first.
      pair: for every cell and position its pair, or the number of pairs where the position is before the suffix.
    """

    cell: Int[Array, "*chunk pair"]
    pos: Int[Array, "*chunk pair"]
    pair: Int[Array, "*chunk cell pos"]

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


def pack(starts: Sequence[int] | np.ndarray, n_pos: int, batch_size: int) -> tuple[Suffixes, np.ndarray]:
    """Packs cells into chunks of `batch_size`, all with the same number of pairs.

    Args:
      starts: for every cell the first position that its edit can change.

    Returns:
      The suffixes with a leading chunk axis, and `[chunk cell]`: the cell in every place, or the number of cells where
      a place is empty.
    """
    lengths = n_pos - np.asarray(starts, int)
    n_cells = len(lengths)
    n_chunks = -(-n_cells // batch_size)
    size = -(-n_cells // n_chunks)
    # the longest cells go round the chunks forth and back, which evens the sums out
    order = np.argsort(-lengths, kind="stable")
    members: list[list[int]] = [[] for _ in range(n_chunks)]
    for i, cell in enumerate(order.tolist()):
        turn, place = divmod(i, n_chunks)
        members[n_chunks - 1 - place if turn % 2 else place].append(cell)
    n_pairs = max(1, max(int(lengths[chunk].sum()) for chunk in members))
    places = np.full((n_chunks, size), n_cells)
    cells, positions = (np.zeros((n_chunks, n_pairs), np.int32) for _ in range(2))
    pairs = np.full((n_chunks, size, n_pos), n_pairs, np.int32)
    for c, chunk in enumerate(members):
        places[c, : len(chunk)] = chunk
        at = 0
        for row, cell in enumerate(chunk):
            n = int(lengths[cell])
            cells[c, at : at + n] = row
            positions[c, at : at + n] = np.arange(n_pos - n, n_pos)
            pairs[c, row, n_pos - n :] = np.arange(at, at + n)
            at += n
        cells[c, at:], positions[c, at:] = cells[c, 0], positions[c, 0]
    return Suffixes(*(jnp.asarray(a, jnp.int32) for a in (cells, positions, pairs))), places
