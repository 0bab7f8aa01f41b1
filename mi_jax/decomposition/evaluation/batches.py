"""Activations in batches of one size, so that one program serves all of them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core.errors import InputError

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some rows of activations, for data that memory does not hold at once.

    Attributes:
      inputs: what the dictionary reads, `[n d_in]`.
      blocks: which sequence or document each row is from.
      targets: what it is to reconstruct, `[n d_out]`; None means the inputs.
    """

    inputs: Float[Array | np.ndarray, "n d_in"]
    blocks: Int[Array | np.ndarray, " token"]
    targets: Float[Array | np.ndarray, "target d_out"] | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """At most `batch_size` rows, filled up by repeating the last one; `real` tells which rows count."""

    inputs: Array
    targets: Array
    blocks: np.ndarray
    real: Bool[np.ndarray, " n"]


def widened(tree: Tree) -> Tree:
    """The same with arrays of half precision in float32: every score is computed and summed in it, or wider.

    Whatever was rounded in half precision keeps its value; nothing is rounded again.
    """

    def wide(leaf):
        if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(np.promote_types(leaf.dtype, np.float32))
        return leaf

    return jax.tree.map(wide, tree)


def pieces(batches: Iterable[Batch], batch_size: int) -> Iterator[Piece]:
    """Cuts batches of any sizes into pieces of `batch_size` rows.

    Raises:
      InputError: blocks or targets that are not one per row.
    """
    for batch in batches:
        n = batch.inputs.shape[0]
        targets = batch.inputs if batch.targets is None else batch.targets
        if batch.blocks.shape != (n,):
            raise InputError(f"blocks must give one block per token, shape ({n},), got {batch.blocks.shape}")
        if targets.shape[0] != n:
            raise InputError(f"targets must have one row per input, {n}; got {targets.shape[0]}")
        size = batch_size if n > batch_size else max(n, 1)
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            real = np.arange(start, start + size) < n
            x = widened(jnp.asarray(batch.inputs[rows]))
            y = x if batch.targets is None else widened(jnp.asarray(targets[rows]))
            yield Piece(x, y, np.asarray(batch.blocks)[rows], real)


def row_slices(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers of every batch, the last one filled up with the last row, and how many of them are real."""
    size = min(batch_size, n)
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1), min(size, n - start)
