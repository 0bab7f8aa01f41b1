"""The loss of a language model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def next_token_loss(
    logits: Float[Array, "batch pos d_vocab"],
    tokens: Int[Array, "batch pos"],
    mask: Bool[Array, "batch pos"] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of every token given those before it, in nats.

    Args:
      logits: of a model that was given `tokens`.
      tokens: right-padded where the lengths differ.
      mask: True at real tokens; padding is neither predicted nor predicted from. None means all are real.

    Returns:
      The mean over the batch's predicted tokens, of which every one counts the same, in a short prompt as in a long
      one; 0 if there is none.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[:, :, 0]
    counted = mask[:, :-1] & mask[:, 1:]
    n = jnp.maximum(counted.sum(dtype=jnp.int32), 1).astype(nll.dtype)
    return jnp.where(counted, nll, 0).sum() / n
