"""Normalisation of every token before it is encoded, undone on what is decoded."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class TokenNorm(eqx.Module):
    """`layer_norm`: (x − mean) / (std + eps); `unit_norm`: x · √d / (‖x‖ + eps), each token's own.

    Attributes:
      kind: which of the two.
      eps: see above.
      ddof: 0 for the standard deviation of a population, 1 for a sample's.
    """

    kind: Literal["layer_norm", "unit_norm"] = eqx.field(static=True)
    eps: float = eqx.field(static=True, default=1e-5)
    ddof: int = eqx.field(static=True, default=0)

    def __call__(self, x: Float[Array, "token d_in"]) -> tuple[Float[Array, "token d_in"], Callable[[Array], Array]]:
        """The normalised activations, and the function that maps reconstructions back."""
        if self.kind == "unit_norm":
            size = (jnp.linalg.norm(x, axis=1, keepdims=True) + self.eps) / x.shape[1] ** 0.5
            return x / size, lambda out: out * size
        mean, deviation = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=self.ddof)
        # eps is on the way in only, as in the checkpoints that have this normalisation
        return (x - mean) / (deviation + self.eps), lambda out: out * deviation + mean
