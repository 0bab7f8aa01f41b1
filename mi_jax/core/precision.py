"""One rule for half precision: what is added up, exponentiated or compared is first widened to 32 bits.

A model in bfloat16 or float16 keeps its dtype in its weights, its stream and its logits. Softmaxes, metrics, means over
prompts and scores are made of values that went through `widened`, or in an accumulator of dtype `sums_in`: a 16-bit sum
of many terms stands still, and the difference of two 16-bit metrics is mostly 0.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def sums_in(dtype: Any) -> Any:
    """The dtype in which values of another are added up: with at least 32 bits."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def widened(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same values with at least 32 bits."""
    return x.astype(sums_in(x.dtype))
