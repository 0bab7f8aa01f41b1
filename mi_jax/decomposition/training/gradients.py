"""The gradient of a training step: codes at places that may run out, and terms that only dead latents have."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.decomposition.config import Objective
from mi_jax.decomposition.objective import Losses, add_at, dead_latents, reads_dead
from mi_jax.decomposition.training.state import trainable


def gradients(
    loss_of: Callable[[Any, Any, Any], tuple[Array, Losses]],
    dictionary: Any,
    chosen: Any,
    *,
    bounded: bool,
    frozen_decoder: bool = False,
    dead: tuple[Bool[Array, " d_sae"], Objective] | None = None,
    weight: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Losses, Any, Bool[Array, ""]]:
    """The loss, its parts, its gradient, and whether the codes had places enough.

    Args:
      loss_of: from a dictionary or a cross-layer transcoder, the places of its codes (None: dense codes), and its dead
        latents as a dictionary of their own; where these are None, the loss has no term for them.
      dictionary: differentiated where `trainable` says so.
      chosen: the places, or None.
      bounded: whether the places may be too few; `chosen.fits` then decides, and a batch that needs more is computed
        densely, to the same numbers.
      frozen_decoder: the decoder has no gradient.
      dead: latents that count as dead, and the objective that says whether the loss has a term for them and how many
        take part; None where `loss_of` sees to them itself.
      weight: factor of the gradient.
    """
    mask = trainable(dictionary, frozen_decoder)
    params, fixed = eqx.partition(dictionary, mask)

    def weighted(params, places, few):
        total, parts = loss_of(eqx.combine(params, fixed), places, few)
        return total if weight is None else total * weight, (total, parts)

    def plain(params, places):
        (_, found), grads = jax.value_and_grad(weighted, has_aux=True)(params, places, None)
        return found, grads

    def with_dead(params, places, latents, objective):
        # dead latents are few: their gradient is added to the rows that they are, not as arrays of the whole size
        few, few_fixed = eqx.partition(dead_latents(dictionary, latents, objective), mask)

        def of(both):
            return weighted(both[0], places, eqx.combine(both[1], few_fixed))

        (_, found), (grads, some) = jax.value_and_grad(of, has_aux=True)((params, few))
        return found, add_at(grads, some, latents, objective)

    def at(places):
        if dead is None or not reads_dead(dead[1]):
            return lambda p: plain(p, places)
        # most steps have no dead latent, and then a program without the term
        latents, objective = dead
        few, none = (lambda p: with_dead(p, places, latents, objective)), (lambda p: plain(p, places))
        return lambda p: jax.lax.cond(latents.any(), few, none, p)

    if chosen is None or not bounded:
        (total, parts), grads = at(chosen)(params)
        return total, parts, grads, jnp.array(True)
    # the rare batch with more codes than places
    (total, parts), grads = jax.lax.cond(chosen.fits, at(chosen), at(None), params)
    return total, parts, grads, chosen.fits
