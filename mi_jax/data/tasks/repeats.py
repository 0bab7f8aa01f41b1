"""Random tokens, twice: what a model predicts better the second time, it looked up (Olsson et al. 2022)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mi_jax.core.errors import InputError


def repeated_tokens(
    n: int, half: int, *, d_vocab: int, seed: int, first: int = 0, repeat: bool = True
) -> Int[Array, "batch pos"]:
    """n sequences of `2 · half` tokens whose second half repeats the first.

    Args:
      first: tokens below are left out, such as special ones.
      repeat: False draws the second half anew, which is the control.

    Raises:
      InputError: no sequence, no token in it, or none to draw from.
    """
    if n < 1 or half < 1 or not 0 <= first < d_vocab:
        raise InputError(
            f"repeated tokens: n={n} sequences and half={half} are 1 at least, and first={first} is one of the "
            f"{d_vocab} tokens"
        )
    rng = np.random.default_rng(seed)
    a, b = rng.integers(first, d_vocab, (2, n, half))
    return jnp.asarray(np.concatenate([a, a if repeat else b], 1), jnp.int32)
