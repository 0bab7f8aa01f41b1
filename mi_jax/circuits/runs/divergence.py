"""How far apart two runs of a model are at the position of the answer, beside the metric of the task."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mi_jax.core.precision import widened


def kl_divergence(
    logits: Float[Array, "batch 1 d_vocab"], reference: Float[Array, "batch 1 d_vocab"]
) -> Float[Array, " batch"]:
    """`KL(reference ‖ logits)` in nats, of every prompt: what is lost by reading `logits` instead of `reference`."""
    p, q = (jax.nn.log_softmax(widened(x[:, 0])) for x in (reference, logits))
    return jnp.where(jnp.isneginf(p), 0.0, jnp.exp(p) * (p - q)).sum(-1)


def prediction(logits: Float[Array, "batch 1 d_vocab"]) -> Int[Array, " batch"]:
    """The token with the largest logit, the first of several."""
    # two reductions that are vectorized; XLA's own of values with their places is not
    x = logits[:, 0]
    largest = (x == x.max(-1, keepdims=True)) | jnp.isnan(x)
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
    return jnp.where(largest, places, x.shape[-1] - 1).min(-1)
