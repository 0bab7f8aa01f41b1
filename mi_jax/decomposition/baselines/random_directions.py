"""Directions drawn at random: what any reconstruction owes to the number of directions alone."""

from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mi_jax.core.errors import InputError
from mi_jax.decomposition.baselines.base import Baseline, centred, check_activations, shifted
from mi_jax.decomposition.baselines.k_sparse import keep_largest

Encoder = Literal["pseudo_inverse", "top_k", "least_squares"]


class RandomDirections(Baseline):
    """Random unit directions around the mean of the activations.

    Attributes:
      w_enc: what the encoder's first product is with: the pseudo-inverse of the directions, or they themselves.
      encoder: "pseudo_inverse" gives dense codes, of all that reconstruct best those with the least squares.
        "top_k" keeps the k inner products with the directions that are largest in absolute value. "least_squares"
        chooses the same k directions and then fits their codes; it takes `[*batch k d_model]` of memory.
    """

    mean: Float[Array, " d_model"]
    w_enc: Float[Array, "d_sae d_model"]
    w_dec: Float[Array, "d_sae d_model"]
    encoder: Encoder = eqx.field(static=True)
    k: int | None = eqx.field(static=True)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """The codes of activations, signed."""
        x = centred(x, self.mean)
        codes = x @ self.w_enc.T
        if self.k is None:
            return codes
        if self.encoder == "top_k":
            return keep_largest(codes, self.k)
        _, chosen = jax.lax.top_k(jnp.abs(codes), self.k)
        rows = self.w_dec[chosen]
        gram = jnp.einsum("...id,...jd->...ij", rows, rows)
        inner = jnp.einsum("...id,...d->...i", rows, x)
        values = jnp.linalg.solve(gram, inner[..., None])[..., 0]
        return jnp.put_along_axis(jnp.zeros_like(codes), chosen, values, axis=-1, inplace=False)

    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """The sum of the directions, weighted by the codes, and the mean."""
        return shifted(codes @ self.w_dec, self.mean)


def fit_random_directions(
    activations: Float[Array, "n d_model"],
    d_sae: int,
    encoder: Encoder = "pseudo_inverse",
    k: int | None = None,
    *,
    key: PRNGKeyArray,
) -> RandomDirections:
    """Draws `d_sae` directions; of the activations only the mean is used.

    Raises:
      InputError: an unknown encoder, k missing or out of range, or activations that are NaN or infinite.
    """
    d_model = activations.shape[1]
    if encoder not in get_args(Encoder):
        raise InputError(f"encoder is one of {', '.join(get_args(Encoder))}; got {encoder!r}")
    if d_sae < 1:
        raise InputError(f"d_sae must be at least 1, got {d_sae}")
    most = min(d_sae, d_model) if encoder == "least_squares" else d_sae
    if encoder == "pseudo_inverse" and k is not None:
        raise InputError(f"the codes of a pseudo-inverse are dense; leave k={k} out, or wrap the result in KSparse")
    if encoder != "pseudo_inverse" and (k is None or not 1 <= k <= most):
        raise InputError(f"encoder {encoder!r} needs k from 1 to {most}, got {k}")
    check_activations(activations, at_least=1)
    directions = jax.random.normal(key, (d_sae, d_model), activations.dtype)
    w_dec = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    w_enc = jnp.linalg.pinv(w_dec).T if encoder == "pseudo_inverse" else w_dec
    return RandomDirections(activations.mean(0), w_enc, w_dec, encoder=encoder, k=k)
