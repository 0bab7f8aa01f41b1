"""The next token from its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def choose(
    logits: Float[Array, "batch d_vocab"],
    *,
    temperature: Float[Array, ""] | None,
    top_k: int | None,
    top_p: Float[Array, ""] | None,
    key: PRNGKeyArray | None,
) -> Int[Array, " batch"]:
    """The most likely token, or one drawn from what `top_k` and `top_p` leave of the distribution.

    Args:
      temperature: divides the logits; None takes the most likely token, as does a very low one.
      top_k: only so many of the largest logits.
      top_p: only the most likely tokens that together first reach this probability.
    """
    if temperature is None or key is None:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    best = logits.max(-1, keepdims=True)
    # relative to the best one, so that no temperature is so low that the quotient means nothing
    smallest_normal = jnp.finfo(jnp.float32).tiny
    logits = jnp.where(logits == best, 0.0, (logits - best) / jnp.maximum(temperature, smallest_normal))
    if top_k is not None:
        smallest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        sorted_probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
        # a token stays while those before it have not reached top_p: the first always does
        kept = jnp.cumsum(sorted_probabilities, -1) - sorted_probabilities < top_p
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
