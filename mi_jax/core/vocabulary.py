"""Tokens that a result is read at: the answer of a task, the choices of a lens, the target of an attribution."""

from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mi_jax.core.errors import InputError


def check_tokens(name: str, tokens: Any, d_vocab: int | None = None) -> None:
    """Raises InputError for a token outside the vocabulary, where its value is known; without a size, a negative one.

    A negative token would count from the end of the vocabulary.
    """
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    known = np.asarray(tokens)
    outside = known[(known < 0) | (known >= (np.inf if d_vocab is None else d_vocab))]
    if outside.size:
        size = "tokens count from 0" if d_vocab is None else f"the vocabulary is 0–{d_vocab - 1}"
        raise InputError(f"{name} holds token {outside[0]}; {size}")


def at_tokens(values: Float[Array, "*place d_vocab"], tokens: Int[Array, "*place choice"]) -> Array:
    """The values of some tokens, `[*place choice]`; NaN for a token that the vocabulary lacks."""
    return jnp.take_along_axis(values, jnp.where(tokens < 0, values.shape[-1], tokens), axis=-1, mode="fill")
