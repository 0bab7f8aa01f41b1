"""Massive activations: the few tokens that own the variance of a residual stream.

Source: Sun et al. 2024, "Massive Activations in Large Language Models".
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mi_jax.core.precision import widened

# a token is massive whose norm is over this many times the median
RATIO = 10.0


def norms(x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch"]:
    """Norms in float32, or in more where the activations have it."""
    return jnp.linalg.norm(widened(x), axis=-1)


def massive_limit(
    sizes: Float[Array, "*batch"], ratio: float = RATIO, counted: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    """The largest norm of a token that is not massive: `ratio` times the median norm.

    Args:
      sizes: norms.
      ratio: see above.
      counted: tokens that the median is over; None for all. NaN where there is none.
    """
    if counted is None:
        return ratio * jnp.median(sizes)
    return ratio * jnp.nanmedian(jnp.where(counted, sizes, jnp.nan))


def massive(x: Float[Array, "*batch d_model"], ratio: float = RATIO) -> Bool[Array, "*batch"]:
    """Tokens whose norm is over `ratio` times the median norm.

    The first position of a sequence is one in most language models, and so is a first token that is repeated. A mean,
    a dictionary or a score that includes them describes them and nothing else: train and score on `x[~massive(x)]`, and
    leave the same tokens as they are when a dictionary is spliced into the model.
    """
    sizes = norms(x)
    return sizes > massive_limit(sizes, ratio)
