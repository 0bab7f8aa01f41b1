"""RMSNorm and LayerNorm."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.precision import widened as widened


class Norm(eqx.Module):
    """RMSNorm, or LayerNorm where there is a bias, over the last axis; `weight` None leaves the input as it is.

    The statistics are taken in float32 or better, whatever the dtype of the input. `offset` is added to the weight.
    """

    weight: Float[Array, "*lead d_model"] | None
    bias: Float[Array, "*lead d_model"] | None
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True, default=0.0)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        if self.weight is None:
            return x
        exact = widened(x)
        if self.bias is not None:
            exact = exact - exact.mean(-1, keepdims=True)
        exact = exact * self.scale(exact)
        weight = self.weight.astype(exact.dtype)
        exact = exact * jnp.broadcast_to(weight + self.offset if self.offset else weight, x.shape)
        if self.bias is not None:
            exact = exact + jnp.broadcast_to(self.bias.astype(exact.dtype), x.shape)
        return exact.astype(x.dtype)

    def scale(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch #d_model"]:
        """What an input, centred where there is a bias, is multiplied with before the weight."""
        return jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)


def normed(norm: Norm | None, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
    """`norm(x)`, or x where there is no norm."""
    return x if norm is None else norm(x)
