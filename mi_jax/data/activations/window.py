"""The buffer of activations on device, and the batches that one filling of it serves."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, Key, Shaped

from mi_jax.core import sharding
from mi_jax.data.activations.permutation import permute


class Activations(eqx.Module):
    """Rows of activations: a batch, a buffer or a piece of a corpus.

    Attributes:
      values: by site; `[row d_model]` for one layer, `[row layer d_model]` for several.
      valid: False for a row that is to have no weight: an outlier, or one that fills up an epoch's last batch.
      context: which context of the corpus each row comes from.
      position: of which token in it.
    """

    values: dict[str, Shaped[Array, "row *width"]]
    valid: Bool[Array, " row"]
    context: Int[Array, " row"]
    position: Int[Array, " row"]

    def __len__(self) -> int:
        return self.valid.shape[0]


class Window(eqx.Module):
    """A filled buffer as a function of the step: `window(t)` is batch t. It is a pytree, to be an argument of a jit.

    Attributes:
      buffer: the rows; numbers of two bytes as their bits, see `as_bits`.
      first_step: the step that draws the first rows.
      n_rows: rows that the window serves.
      from_left: how many of them come from the earlier of its two blocks.
      sizes: rows of the earlier and the later block.
      starts: where these two begin in the buffer.
      keys: of the permutations within the segment, the earlier and the later block.
      dtypes: of the values, by site.
    """

    buffer: Activations
    first_step: Int[Array, ""]
    n_rows: Int[Array, ""]
    from_left: Int[Array, ""]
    sizes: Int[Array, "2"]
    starts: Int[Array, "2"]
    keys: Key[Array, "3"]
    dtypes: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __call__(self, step: int | Int[Array, ""]) -> Activations:
        """Batch `step`, which may be traced; it must be one of the steps that came with the window."""
        first = (jnp.asarray(step, jnp.int32) - self.first_step) * self.batch_size
        row = first + jnp.arange(self.batch_size, dtype=jnp.int32)
        place = permute(row % self.n_rows, self.n_rows, key=self.keys[0])
        # the segment begins in the middle of the earlier block
        middle = len(self.buffer) // 4
        left = self.starts[0] + permute(middle + place, self.sizes[0], key=self.keys[1])
        right = self.starts[1] + permute(place - self.from_left, self.sizes[1], key=self.keys[2])
        slots = jnp.where(place < self.from_left, left, right)
        batch = jax.tree.map(lambda x: x[slots], self.buffer)
        values = {name: batch.values[name].view(dtype) for name, dtype in self.dtypes}
        batch = Activations(values, batch.valid & (row < self.n_rows), batch.context, batch.position)
        if self.mesh is None:
            return batch
        return jax.lax.with_sharding_constraint(batch, row_shardings(batch, self.mesh))


def as_bits(rows: Activations) -> Activations:
    """Rows with numbers of two bytes as uint16: on a CPU, a write into a bfloat16 buffer would convert all of it."""
    return jax.tree.map(lambda x: x.view(jnp.uint16) if x.dtype.itemsize == 2 else x, rows)


def empty(rows: Activations, n: int, mesh: Mesh | None) -> Activations:
    """A buffer of `n` rows like these."""
    rows = jax.eval_shape(as_bits, rows)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), rows)
    out = None if mesh is None else row_shardings(shapes, mesh)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=out)()


@partial(jax.jit, donate_argnames="buffer")
def write(buffer: Activations, rows: Activations, slots: Int[Array, " row"]) -> Activations:
    """Puts rows into slots of the buffer, which is donated; a slot past its end drops the row."""
    return jax.tree.map(lambda into, new: into.at[slots].set(new, mode="drop"), buffer, as_bits(rows))


def row_shardings(rows: Activations, mesh: Mesh) -> Activations:
    """Rows over the mesh axis of the batch; a tree of shardings."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, sharding.spec(("batch", *(None,) * (x.ndim - 1)), x.shape, mesh)), rows
    )
