"""Massive activations: the few tokens that own the variance of a residual stream.

Source: Sun et al. 2024, "Massive Activations in Large Language Models".
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def massive(x: Float[Array, "*batch d_model"], ratio: float = 10.0) -> Bool[Array, "*batch"]:
    """Tokens whose norm is over `ratio` times the median norm.

    The first position of a sequence is one in most language models, and so is a first token that is repeated. A mean,
    a dictionary or a score that includes them describes them and nothing else: train and score on `x[~massive(x)]`, and
    leave the same tokens as they are when a dictionary is spliced into the model.
    """
    norms = jnp.linalg.norm(x, axis=-1)
    return norms > ratio * jnp.median(norms)
