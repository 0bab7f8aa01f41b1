"""BatchTopK's threshold outside training: a running mean of the smallest code kept, and at the end a pass over data.

The running mean follows the dictionary from step 0 on and lags behind one that still moves, or whose k does. So every
training ends with a pass over some batches, which says what threshold gives the final k.
"""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mi_jax.decomposition.activations import BatchTopK
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.selection import largest_of_batch

# of the last pass
TOKENS = 32_768
# what is read in a batch, and which of its rows are valid; None for all
Read = tuple[Float[Array, "token *layer d_in"], Bool[Array, " token"] | None]


def running(
    old: Float[Array, "*layer"], smallest: Float[Array, ""], step: Int[Array, ""], rate: float
) -> Float[Array, "*layer"]:
    """The mean of the smallest codes so far, where each counts 1 − rate times as much as the next one.

    The weights have sum 1 at every step (the bias correction of Adam's moments); a batch without codes, whose
    `smallest` is infinite, changes nothing.
    """
    weight = rate / (1 - (1 - rate) ** (step.astype(jnp.float32) + 1))
    return jnp.where(jnp.isfinite(smallest), old + weight * (smallest - old), old)


@eqx.filter_jit
def largest_codes(
    dictionary: Dictionary, x: Float[Array, "token d_in"], valid: Bool[Array, " token"] | None = None
) -> Float[Array, " code"]:
    """The largest codes of a batch, twice as many as it keeps, in no order; 0 where fewer are positive."""
    activation = dictionary.activation
    assert isinstance(activation, BatchTopK)
    h = (x - dictionary.centre[None, :]) @ dictionary.encoder.T
    if valid is not None:
        h = jnp.where(valid[:, None], h, -jnp.inf)
    return largest_of_batch(h, 2 * activation.k * x.shape[0], dictionary.b_enc)[0]


def settled(dictionary: Any, batches: Iterable[Read], largest: Callable[..., Array] = largest_codes) -> Any:
    """A BatchTopK dictionary whose threshold keeps k codes per token of all batches together; others as they are.

    Args:
      dictionary: in the units of its training, with its final number of codes.
      batches: what it reads, normalised; no more than needed is read, up to `TOKENS` tokens (of a layer).
      largest: of a dictionary and a batch, and its valid rows where not all are: at least as many codes as it keeps,
        where no batch has over twice k.
    """
    activation = dictionary.activation
    if not isinstance(activation, BatchTopK):
        return dictionary
    found, n = [], 0
    for x, valid in batches:
        found.append(np.asarray(largest(dictionary, x) if valid is None else largest(dictionary, x, valid)))
        n += x.size // x.shape[-1] if valid is None else int(valid.sum())
        if n >= TOKENS:
            break
    if not found:
        return dictionary
    codes = np.concatenate(found)
    # the largest that is not kept: a code must be over the threshold
    place = max(len(codes) - activation.k * n - 1, 0)
    new = jnp.full_like(activation.threshold, np.partition(codes, place)[place])
    return eqx.tree_at(lambda d: d.activation.threshold, dictionary, jax.device_put(new, activation.threshold.sharding))
