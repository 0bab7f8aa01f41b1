"""What every baseline can do: the calls of a dictionary, so that the same code evaluates both."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError


class Baseline(eqx.Module):
    """Codes of activations, and activations of codes."""

    @abc.abstractmethod
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """The codes of activations."""

    @abc.abstractmethod
    def decode(self, codes: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_model"]:
        """The activations that these codes stand for."""

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.decode(self.encode(x))


def centred(x: Float[Array, "*batch d_model"], mean: Float[Array, " d_model"]) -> Float[Array, "*batch d_model"]:
    """Activations without their mean."""
    return x - jnp.broadcast_to(mean, x.shape)


def shifted(x: Float[Array, "*batch d_model"], mean: Float[Array, " d_model"]) -> Float[Array, "*batch d_model"]:
    """Activations with their mean; the inverse of `centred`."""
    return x + jnp.broadcast_to(mean, x.shape)


def check_activations(activations: Float[Array | np.ndarray, "n d_model"], at_least: int = 2) -> None:
    """Raises InputError if there are too few activations to fit anything, or some are NaN or infinite."""
    if len(activations) < at_least:
        raise InputError(f"a fit needs {at_least} activations or more, got {len(activations)}")
    wrong = ~np.isfinite(np.asarray(activations)).all(1)
    if wrong.any():
        raise InputError(
            f"{int(wrong.sum())} of {len(activations)} activations are NaN or infinite, the first of them is number "
            f"{int(np.argmax(wrong))}; leave them out"
        )
