"""Which tokens' activations count: known from the tokens alone, before any model runs."""

from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from mi_jax.core.errors import InputError


def usable_tokens(
    tokens: Int[np.ndarray, "context pos"],
    *,
    mask: Bool[np.ndarray, "mask_context mask_pos"] | None = None,
    special_ids: SupportsIndex | Iterable[SupportsIndex] = (),
    skip_positions: int = 1,
) -> Bool[np.ndarray, "context pos"]:
    """True where an activation is to be used.

    Args:
      mask: False at padding.
      special_ids: tokens to leave out, such as those of the beginning of a text, its end, and padding: usually
        `Tokenizer.special_ids`.
      skip_positions: how many tokens to leave out at the start of each context. The first owns the variance of the
        residual stream in most language models, whichever token it is.

    Raises:
      InputError: a mask of another shape, or a negative number of positions.
    """
    if mask is not None and mask.shape != tokens.shape:
        raise InputError(f"the mask has shape {mask.shape}, the tokens {tokens.shape}; both are [context pos]")
    if skip_positions < 0:
        raise InputError(f"skip_positions={skip_positions}; it is 0 or more")
    usable = np.ones(tokens.shape, bool) if mask is None else np.array(mask, bool)
    # contexts begin at their first real token, also where they are padded on the left
    start = skip_positions + usable.argmax(1)[:, None]
    return usable & ~np.isin(tokens, token_ids(special_ids)) & (np.arange(tokens.shape[1])[None, :] >= start)


def token_ids(ids: SupportsIndex | Iterable[SupportsIndex]) -> list[int]:
    """One token or any collection of tokens, a set or an array too, each once and in order."""
    return sorted({int(token) for token in (ids if isinstance(ids, Iterable) else (ids,))})
