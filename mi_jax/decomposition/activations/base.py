"""What every activation of a dictionary is: a choice of places, and a value at each chosen place.

The choice carries no gradient; the value is a differentiable function of the pre-activation at its place and of the
activation's own parameters there. So the same equation serves dense codes and k-sparse ones, and no gradient needs an
array [token, d_sae].
"""

import abc
from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Bool, Float

from mi_jax.decomposition.codes import Where, attach

At = Callable[[Array], Array]


class Chosen(eqx.Module):
    """The places of a batch's codes and the pre-activations there, all without gradient.

    Attributes:
      h: pre-activations at the places.
      where: the places.
      fits: False where there were more codes than places; the choice is then of no use and codes must be dense.
    """

    h: Array
    where: Where
    fits: Bool[Array, ""]


class Activation(eqx.Module):
    """Turns pre-activations h = (x − b_dec) w_encᵀ + b_enc into codes."""

    @abc.abstractmethod
    def dense(
        self, h: Float[Array, "token d_sae"], b_enc: Float[Array, " d_sae"], *, training: bool = False
    ) -> Float[Array, "token d_sae"]:
        """The codes by their defining equation.

        With `training`, by the one of a training step where it differs (BatchTopK chooses over the whole batch).
        """

    @abc.abstractmethod
    def value(self, h: Array, at: At, b_enc: Float[Array, " d_sae"]) -> Array:
        """Codes from the pre-activations at their places; `at` gives a parameter per latent at the same places."""

    def encode(
        self,
        x: Float[Array, "token d_in"],
        w_enc: Float[Array, "d_sae d_in"],
        b_enc: Float[Array, " d_sae"],
        *,
        training: bool = False,
    ) -> Float[Array, "token d_sae"]:
        """Dense codes of centred activations."""
        return self.dense(x @ w_enc.T + b_enc[None, :], b_enc, training=training)

    def choose(
        self,
        x: Float[Array, "token d_in"],
        w_enc: Float[Array, "d_sae d_in"],
        b_enc: Float[Array, " d_sae"],
        valid: Bool[Array, " token"] | None = None,
    ) -> Chosen | None:
        """The places of a training batch of centred activations; None where codes are dense.

        `valid` says which rows count where the choice is over the batch; None for all.
        """
        return None

    def codes(
        self,
        chosen: Chosen,
        x: Float[Array, "token d_in"],
        centre: Float[Array, " d_in"],
        w_enc: Float[Array, "d_sae d_in"],
        b_enc: Float[Array, " d_sae"],
    ) -> tuple[Array, Array]:
        """Values at the chosen places and the pre-activations there, both with their gradients."""
        h = attach(chosen.h, chosen.where, x, centre, w_enc, b_enc)
        return self.value(h, at_places(chosen.where), b_enc), h

    def scaled(self, factor: Float[Array, "*d_sae"] | float) -> "Activation":
        """The activation whose codes are `factor` times as large when pre-activations are."""
        return self


def everywhere(parameter: Array) -> Array:
    """A parameter per latent, at every place of dense codes."""
    return parameter[None, :]


def at_places(where: Where) -> At:
    """A parameter per latent, at the places of sparse codes; 0 at empty ones."""
    return lambda parameter: parameter.at[where.latents].get(mode="fill", fill_value=0.0)
