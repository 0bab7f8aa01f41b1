"""The rule for half precision: sums, comparisons and factorisations in float32, tolerances by dtype.

A model in bfloat16 or float16 keeps its values in that dtype. Means, counts, differences, factorisations and scores of
them are made of `widened` values and rounded at most once, at the end.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def widened(x: Array) -> Array:
    """In float32, where the dtype is a float of fewer bits."""
    return x.astype(widened_dtype(x.dtype))


def widened_dtype(dtype: Any) -> Any:
    """The dtype in which values of `dtype` are summed and compared."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.float32 if half else dtype


def rounding(dtype: Any) -> float:
    """The distance of 1 from the next number, `eps`; 0 for what is not floating."""
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def tolerance(dtype: Any, exact: float = 1e-5) -> float:
    """By how much two computations of one value may differ, relative to its scale.

    Args:
      exact: for float32 and wider.
    """
    # a handful of roundings on the way: norm, projection, softmax, sum
    return exact if widened_dtype(dtype) == dtype else max(exact, 8 * rounding(dtype))
