"""Orthogonal matching pursuit: what codes a dictionary's directions allow, whatever its encoder finds.

Source: Pati, Rezaiifar and Krishnaprasad 1993.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.decomposition.evaluation.batches import widened


@partial(jax.jit, static_argnames=("k", "nonnegative"))
def orthogonal_matching_pursuit(
    directions: Float[Array, "n d_model"], x: Float[Array, "batch d_model"], k: int, *, nonnegative: bool = False
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """Orthogonal matching pursuit: k times the direction most along the residual, then least squares on all so far.

    What an encoder misses that this finds on the same directions is its amortisation gap.

    Args:
      directions: unit rows.
      nonnegative: choose by ⟨d_j, r⟩ and not by its size.

    Returns:
      Codes and indices, in the order of choice.
    """
    directions, x = widened((directions, x))

    def one(x):
        def step(state, i):
            indices, residual = state
            along = directions @ residual
            along = along if nonnegative else jnp.abs(along)
            taken = jnp.zeros(along.shape, bool).at[indices].set(jnp.arange(k) < i, mode="drop")
            indices = indices.at[i].set(jnp.argmax(jnp.where(taken, -jnp.inf, along)).astype(jnp.int32))
            rows = jnp.where((jnp.arange(k) <= i)[:, None], directions[indices], 0)
            gram = rows @ rows.T + jnp.diag((jnp.arange(k) > i).astype(rows.dtype))
            codes = jnp.linalg.solve(gram, rows @ x)
            return (indices, x - codes @ rows), codes

        start = (jnp.full(k, directions.shape[0], jnp.int32), x)
        (indices, _), codes = jax.lax.scan(step, start, jnp.arange(k))
        return codes[-1], indices

    return jax.vmap(one)(x)


class Pursuit(eqx.Module):
    """A dictionary's decoder with codes by orthogonal matching pursuit in place of its encoder.

    Every score takes it for the dictionary; the difference is the amortisation gap of the encoder.
    """

    w_dec: Float[Array, "d_sae d_model"]
    b_dec: Float[Array, " d_model"]
    k: int = eqx.field(static=True)
    nonnegative: bool = eqx.field(static=True, default=False)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """Dense codes, zero outside the k places."""
        norms = jnp.maximum(jnp.linalg.norm(self.w_dec, axis=1), 1e-30)
        rows = x.reshape(-1, x.shape[-1]) - self.b_dec[None, :]
        values, indices = orthogonal_matching_pursuit(
            self.w_dec / norms[:, None], rows, self.k, nonnegative=self.nonnegative
        )
        codes = jnp.zeros((rows.shape[0], self.w_dec.shape[0]), values.dtype)
        codes = jnp.put_along_axis(codes, indices, values / norms[indices], axis=1, inplace=False)
        return codes.reshape(*x.shape[:-1], -1)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """Reconstruction from dense codes."""
        return codes @ self.w_dec + jnp.broadcast_to(self.b_dec, (*codes.shape[:-1], self.b_dec.shape[0]))

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.decode(self.encode(x))
