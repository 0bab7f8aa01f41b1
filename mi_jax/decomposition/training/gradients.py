"""The gradient of a loss whose codes are at places that may run out."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.decomposition.objective import Losses
from mi_jax.decomposition.training.state import trainable


def gradients(
    loss_of: Callable[[Any, Any], tuple[Array, Losses]],
    dictionary: Any,
    chosen: Any,
    *,
    bounded: bool,
    frozen_decoder: bool = False,
) -> tuple[Float[Array, ""], Losses, Any, Bool[Array, ""]]:
    """The loss, its parts, its gradient, and whether the codes had places enough.

    Args:
      loss_of: from a dictionary or a cross-layer transcoder and the places of its codes (None: dense codes).
      dictionary: differentiated where `trainable` says so.
      chosen: the places, or None.
      bounded: whether the places may be too few; `chosen.fits` then decides, and a batch that needs more is computed
        densely, to the same numbers.
      frozen_decoder: the decoder has no gradient.
    """
    params, fixed = eqx.partition(dictionary, trainable(dictionary, frozen_decoder))

    def value_and_grad(places):
        return jax.value_and_grad(lambda p: loss_of(eqx.combine(p, fixed), places), has_aux=True)

    if chosen is None or not bounded:
        (total, parts), grads = value_and_grad(chosen)(params)
        return total, parts, grads, jnp.array(True)
    (total, parts), grads = jax.lax.cond(chosen.fits, value_and_grad(chosen), value_and_grad(None), params)
    return total, parts, grads, chosen.fits
