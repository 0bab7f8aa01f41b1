"""The limit of a training step's speed: the encoder's forward matmul, and what the optimiser must read and write.

Every k-sparse step computes all pre-activations once, 2 · tokens · d_in · d_sae operations, to see which are largest;
its other products are with k latents per token. Every step of Adam reads parameters, gradients and two moments and
writes all but the gradients: 7 numbers per parameter. The limit is operations / the measured rate of a matmul of this
very shape, plus optax's Adam compiled alone, in a loop as the
steps are. The traffic limit is stricter: instead of that it takes the smaller of
Adam's traffic / the measured rate of writing an array in place, and the fastest update by hand. Choosing, decoding and
the gradients' scatters are taken to be free.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def encoder_flops(d_in: int, d_sae: int, batch: int) -> int:
    """Operations of all pre-activations of a batch."""
    return 2 * batch * d_in * d_sae


def optimiser_bytes(parameters: int) -> int:
    """Bytes that an update by Adam reads and writes in float32."""
    return 4 * 7 * parameters


@partial(jax.jit, donate_argnums=(0, 1, 2))
def adam(
    params: Float[Array, "row width"],
    first: Float[Array, "row width"],
    second: Float[Array, "row width"],
    grads: Float[Array, "row width"],
) -> tuple[Float[Array, "row width"], Float[Array, "row width"], Float[Array, "row width"]]:
    """One update by Adam, in place, its bias corrections in the constants."""
    first = 0.9 * first + 0.1 * grads
    second = 0.999 * second + 0.001 * grads * grads
    return params - 3e-4 * first / (jnp.sqrt(second) + 1e-8), first, second


@partial(jax.jit, donate_argnums=0)
def _scaled(array: Float[Array, "row width"]) -> Float[Array, "row width"]:
    return array * 0.5


def adam_seconds(d_in: int, d_sae: int, *, repeats: int = 5) -> float:
    """The fewest seconds of updates of encoder and decoder, as one array."""
    shape = (2 * d_sae, d_in)
    grads, state = jnp.ones(shape), (jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape))
    return _fastest(lambda state: adam(*state, grads), state, repeats)


def optax_adam_seconds(d_in: int, d_sae: int, *, repeats: int = 7, steps: int = 10) -> float:
    """The median seconds of optax's Adam on encoder and decoder, compiled alone: `steps` in one program, in place."""
    optimiser, shape = optax.adam(3e-4), (d_sae, d_in)
    params = {"w_enc": jnp.ones(shape), "w_dec": jnp.ones(shape)}
    grads = jax.tree.map(jnp.ones_like, params)

    @partial(jax.jit, donate_argnums=0)
    def update(state):
        def one(i, state):
            # gradients of its own for every step, or what comes of them alone would be computed once for all
            size = 1 + 1e-3 * i.astype(jnp.float32)
            mine = jax.tree.map(lambda g: g * size, grads)
            # optax raises its decay rates to the power of an integer count
            with jax.numpy_dtype_promotion("standard"):
                updates, moments = optimiser.update(mine, state[1], state[0])
            return optax.apply_updates(state[0], updates), moments

        return jax.lax.fori_loop(0, steps, one, state)

    state, taken = jax.block_until_ready(update((params, optimiser.init(params)))), []
    for _ in range(repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(update(state))
        taken.append((time.perf_counter() - start) / steps)
    return statistics.median(taken)


def write_rate(d_in: int, d_sae: int, *, repeats: int = 5) -> float:
    """The highest rate at which an array of that size is read and written in place, in bytes per second."""
    array = jnp.ones((2 * d_sae, d_in))
    return 2 * array.nbytes / _fastest(_scaled, array, repeats)


def step_seconds(d_in: int, d_sae: int, batch: int, *, matmul_rate: float, write_rate: float, adam: float) -> float:
    """Fewest seconds of a step.

    Args:
      d_in: width of the activations.
      d_sae: number of latents.
      batch: tokens of a step.
      matmul_rate: operations per second.
      write_rate: bytes per second, read or written.
      adam: seconds of the fastest update.
    """
    traffic = optimiser_bytes(2 * d_in * d_sae) / write_rate
    return encoder_flops(d_in, d_sae, batch) / matmul_rate + min(traffic, adam)


def _fastest(update: Callable[[Any], Any], state: Any, repeats: int) -> float:
    state, best = jax.block_until_ready(update(state)), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        state = jax.block_until_ready(update(state))
        best = min(best, time.perf_counter() - start)
    return best
