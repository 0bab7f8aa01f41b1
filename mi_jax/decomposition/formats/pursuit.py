"""Matching pursuit as SAELens has it: a token also stops once a step has chosen no new latent."""

import jax
import jax.numpy as jnp
from jax import lax

from mi_jax.decomposition.activations import MatchingPursuit


class PursuitUntilRepeat(MatchingPursuit):
    """`MatchingPursuit` that looks after each step, not before it, whether a token is done.

    It is done where ‖r‖ < `tolerance` or where the step added to a latent that has a code already.
    """

    def pursue(self, x, rows):
        def take(state, _):
            rest, going, chosen = state
            h = rest @ rows.T
            latent = jnp.argmax(h, 1)
            value = jnp.maximum(jnp.take_along_axis(h, latent[:, None], 1)[:, 0], 0.0)
            value = jnp.where(going, value, 0.0)
            found = value, jnp.where(value > 0, latent.astype(jnp.int32), rows.shape[0])
            rest = rest - value[:, None] * rows[latent]
            is_new = (value > 0) & ~jnp.take_along_axis(chosen, latent[:, None], 1)[:, 0]
            chosen = chosen | (is_new[:, None] & (jnp.arange(rows.shape[0])[None, :] == latent[:, None]))
            return (rest, going & is_new & (jnp.linalg.norm(rest, axis=1) >= self.tolerance), chosen), found

        n = x.shape[0]
        state = x, jnp.ones(n, bool), jnp.zeros((n, rows.shape[0]), bool)
        _, (values, latents) = lax.scan(take, state, length=self.k)
        return jax.lax.stop_gradient(values.T), latents.T
