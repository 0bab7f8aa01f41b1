"""A baseline's codes cut down to k per activation, so that it compares with a dictionary of the same L0."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines.base import Baseline


class KSparse(Baseline):
    """The k codes of each activation that are largest in absolute value; the others become 0.

    For orthonormal directions, such as those of `PCA`, no other k of them reconstruct better.

    Example:
      `KSparse(fit_pca(activations, d_model), k=32)`
    """

    dictionary: Baseline
    k: int = eqx.field(static=True)

    def __check_init__(self):
        if self.k < 1:
            raise InputError(f"k must be at least 1, got {self.k}")

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """The codes of the baseline, k of them.

        Raises:
          InputError: the baseline has fewer than k.
        """
        codes = self.dictionary.encode(x)
        if self.k > codes.shape[-1]:
            raise InputError(f"k={self.k} of the {codes.shape[-1]} codes of a {type(self.dictionary).__name__}")
        return keep_largest(codes, self.k)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """What the baseline makes of the codes."""
        return self.dictionary.decode(codes)


def keep_largest(codes: Float[Array, "*batch d_sae"], k: int) -> Float[Array, "*batch d_sae"]:
    """The k codes that are largest in absolute value, in place; of equal ones, the first."""
    _, chosen = jax.lax.top_k(jnp.abs(codes), k)
    values = jnp.take_along_axis(codes, chosen, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(codes), chosen, values, axis=-1, inplace=False)
