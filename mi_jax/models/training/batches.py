"""Where batches come from: a function of the step, so that a run that resumes sees the same ones."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from mi_jax.core.errors import InputError

Batches = Callable[[Int[Array, ""]], Any]


class Sampled(eqx.Module):
    """Rows drawn at random, with replacement, from data that is held in memory.

    Attributes:
      data: arrays whose first axes are equally long; the batch has the same structure.
      batch_size: rows of a batch.
      key: batch t is drawn with `fold_in(key, t)`.

    Example:
      `train(model, loss, Sampled({"tokens": tokens, "mask": mask}, 32, key=key), optimizer=adam, steps=1000)`
    """

    data: PyTree[Array]
    batch_size: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, data: PyTree[Array], batch_size: int, *, key: PRNGKeyArray):
        """Raises InputError if the arrays differ in length, or a size is not positive."""
        lengths = sorted({x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(data)})
        if len(lengths) != 1 or not lengths[0] or batch_size < 1:
            raise InputError(
                f"batches of {batch_size} rows of arrays of {' and '.join(map(str, lengths)) or 'no'} rows; "
                "all arrays have the same number of rows, and a batch has at least one"
            )
        self.data, self.batch_size, self.key = data, batch_size, key

    def __call__(self, step: Int[Array, ""]) -> PyTree[Array]:
        n = jax.tree.leaves(self.data)[0].shape[0]
        rows = jax.random.randint(jax.random.fold_in(self.key, step), (self.batch_size,), 0, n)
        return jax.tree.map(lambda x: x[rows], self.data)
