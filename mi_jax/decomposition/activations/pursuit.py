"""Matching pursuit: codes found one after the other, each on what the earlier ones left over.

Source: Costa et al. 2025 (MP-SAE, arXiv 2506.03093); Mallat & Zhang 1993.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mi_jax.decomposition.activations.base import Activation, Chosen
from mi_jax.decomposition.codes import Placed, dense


class MatchingPursuit(Activation):
    """r₀ = x − b_dec; k times: j = argmax ⟨r, d_j⟩, z_j += ⟨r, d_j⟩, r −= ⟨r, d_j⟩ d_j. Encoder and decoder are one.

    A token stops where ‖r‖ < `tolerance` or where no inner product is positive. The dictionary's rows have unit norm.
    """

    k: int = eqx.field(static=True)
    tolerance: float = eqx.field(static=True, default=1e-2)

    def dense(self, h, b_enc, *, training: bool = False):
        raise NotImplementedError("matching pursuit reads activations, not pre-activations: call `encode`")

    def value(self, h, at, b_enc):
        return h

    def encode(self, x, w_enc, b_enc, *, training: bool = False):
        values, latents = self.pursue(x, w_enc)
        return dense(values, Placed(latents), w_enc.shape[0])

    def choose(self, x, w_enc, b_enc, valid=None):
        values, latents = self.pursue(x, w_enc)
        return Chosen(values, Placed(latents), jnp.array(True))

    def codes(self, chosen, x, centre, w_enc, b_enc):
        def take(rest, place):
            latents, used = place
            rows = w_enc.at[latents].get(mode="fill", fill_value=0.0)
            value = jnp.where(used, (rest * rows).sum(1), 0.0)
            return rest - value[:, None] * rows, value

        latents = chosen.where.latents
        _, values = lax.scan(take, x - centre[None, :], (latents.T, (chosen.h != 0).T))
        return values.T, values.T

    def pursue(
        self, x: Float[Array, "token d_in"], rows: Float[Array, "d_sae d_in"]
    ) -> tuple[Float[Array, "token k"], Array]:
        """Values and latents in the order they were found; after a token stopped they are 0 and `d_sae`."""

        def take(state, _):
            rest, going = state
            h = rest @ rows.T
            latent = jnp.argmax(h, 1)
            value = jnp.take_along_axis(h, latent[:, None], 1)[:, 0]
            going = going & (value > 0) & (jnp.linalg.norm(rest, axis=1) >= self.tolerance)
            value = jnp.where(going, value, 0.0)
            found = value, jnp.where(going, latent.astype(jnp.int32), rows.shape[0])
            return (rest - value[:, None] * rows[latent], going), found

        _, (values, latents) = lax.scan(take, (x, jnp.ones(x.shape[0], bool)), length=self.k)
        return jax.lax.stop_gradient(values.T), latents.T

    def scaled(self, factor):
        return dataclasses.replace(self, tolerance=self.tolerance * float(factor))
