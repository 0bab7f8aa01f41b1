"""A streaming monitor: one probe score a token, and a running maximum whose state has a constant size.

The state is the carry of a scan, so a monitor lives inside a compiled decoding step. `offline` and `stream` agree.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.applications.probe import Probe


class Monitor(eqx.Module):
    """A probe and the threshold on its running maximum at which it raises an alarm."""

    probe: Probe
    threshold: Float[Array, ""]

    def start(self, batch: int) -> Float[Array, " batch"]:
        """State before the first token."""
        return jnp.full((batch,), -jnp.inf, self.probe.weight.dtype)

    def update(
        self, state: Float[Array, " batch"], x: Float[Array, "batch d_model"]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """Takes in one token's activations; returns the new state and the score so far."""
        state = jnp.maximum(state, self.probe(x))
        return state, state

    def stream(self, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos"]:
        """Scores token by token."""
        _, scores = jax.lax.scan(
            lambda state, row: self.update(state, row), self.start(x.shape[0]), jnp.moveaxis(x, 1, 0)
        )
        return scores.T

    def offline(self, x: Float[Array, "batch pos d_model"]) -> Float[Array, "batch pos"]:
        """The same scores from all tokens at once."""
        return jax.lax.cummax(self.probe(x), axis=1)

    def alarms(self, scores: Float[Array, "batch pos"]) -> Bool[Array, "batch pos"]:
        """True from the token on at which the alarm is raised; a score that is NaN raises it too."""
        return ~(scores <= self.threshold)
