"""How far apart two runs of a model are at the position of the answer, beside the metric of the task."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kl_divergence(
    logits: Float[Array, "batch 1 d_vocab"], reference: Float[Array, "batch 1 d_vocab"]
) -> Float[Array, " batch"]:
    """`KL(reference ‖ logits)` in nats, of every prompt: what is lost by reading `logits` instead of `reference`."""
    p, q = jax.nn.log_softmax(reference[:, 0]), jax.nn.log_softmax(logits[:, 0])
    return jnp.where(jnp.isneginf(p), 0.0, jnp.exp(p) * (p - q)).sum(-1)
