"""Where training batches come from, inside the compiled program: batch t is a function of the source and of t."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from mi_jax.core import sharding
from mi_jax.core.precision import widened


@runtime_checkable
class Source(Protocol):
    """A pytree with the batches of some steps."""

    def batch(self, step: Int[Array, ""]) -> tuple[Array, Array, Array | None]:
        """What is read and what is predicted at a step, normalised, both [token, width], and which rows have weight.

        The last is boolean; None where all have. Rows without weight hold any finite numbers.
        """
        ...


class InMemory(eqx.Module):
    """One epoch over activations that are held in memory.

    Attributes:
      x: what is read, one row per token; of half precision, batches are widened to float32.
      y: what is predicted; None for x.
      order: the epoch's permutation.
      scale_x, scale_y: factors to unit variance per dimension.
      batch_size: tokens per step.
      mesh: shards batches.
    """

    x: Float[Array, "n d_in"]
    y: Float[Array, "n d_out"] | None
    order: Int[Array, " n"]
    scale_x: Float[Array, ""]
    scale_y: Float[Array, ""]
    batch_size: int = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def batch(self, step: Int[Array, ""]) -> tuple[Array, Array, None]:
        start = step % (self.x.shape[0] // self.batch_size) * self.batch_size
        rows = jax.lax.dynamic_slice_in_dim(self.order, start, self.batch_size)
        x = self._placed(widened(self.x[rows]) * self.scale_x)
        return x, x if self.y is None else self._placed(widened(self.y[rows]) * self.scale_y), None

    def _placed(self, x: Array) -> Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(x, self.mesh))


def batch_sharding(x: Array, mesh: Mesh) -> NamedSharding:
    """Rows over the mesh axis of batches."""
    return NamedSharding(mesh, sharding.spec(("batch", "d_model"), x.shape, mesh))


@jax.jit
def normalisation(
    x: Float[Array, "n width"], valid: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, " width"], Float[Array, ""]]:
    """The mean over the valid rows, and the factor that makes their variance per dimension 1."""
    x = widened(x)
    if valid is None:
        mean = x.mean(0)
        return mean, jax.lax.rsqrt(jnp.mean((x - mean[None, :]) ** 2))
    rows, weight = jnp.maximum(valid.sum(dtype=x.dtype), 1.0), valid[:, None]
    mean = jnp.where(weight, x, 0.0).sum(0) / rows
    return mean, jax.lax.rsqrt((jnp.where(weight, x - mean[None, :], 0.0) ** 2).sum() / (rows * x.shape[1]))


def filled(x: Float[Array, "n width"], valid: Bool[Array, " n"]) -> Float[Array, "n width"]:
    """The rows, with the mean of the valid ones in place of the others.

    These have no weight, but an outlier among them would take up the places of codes.
    """
    rows, weight = jnp.maximum(valid.sum(dtype=x.dtype), 1.0), valid[:, None]
    return jnp.where(weight, x, (jnp.where(weight, x, 0.0).sum(0) / rows)[None, :])
