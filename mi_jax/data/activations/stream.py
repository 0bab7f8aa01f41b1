"""Batches of activations straight from a language model: nothing is stored but one buffer on device."""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from mi_jax.core.sites import At
from mi_jax.core.transforms import SiteModel
from mi_jax.data.activations.shuffled import Shuffled
from mi_jax.data.activations.source import ModelSource


class ActivationStream(Shuffled):
    """Shuffled batches of a model's activations on a corpus; batch t is a function of (key, t).

    Every usable activation is served once per epoch. The forward ends after the last layer asked for, and one forward
    serves all sites. What is known from the tokens (padding, special tokens, the first positions) is left out before;
    an outlier, which only the forward shows, comes with `valid` False.

    Args:
      model: any model with sites.
      tokens: the corpus; right-padded contexts of one length.
      sites: what to capture, such as `mi.at("resid_post", layers=15)`; a value per token.
      batch_size: rows of a batch.
      buffer_size: rows of the buffer, at least 4 batches; the larger, the better the mixing. Half of it is filled anew
        at a time.
      key: of the shuffle.
      mask: False at padding; the model gets it too.
      special_ids: tokens whose activations are left out.
      skip_positions: how many positions to leave out at the start of every context.
      outlier_ratio: an activation whose norm is over this many times the median of its chunk, at any site and layer,
        is not valid; None lets all pass.
      contexts_per_chunk: contexts of one forward.
      dtype: of the buffer; the model's own by default.
      mesh: splits contexts, buffer and batches over its `data` axis.

    Raises:
      InputError: an empty corpus, one smaller than the buffer, tokens of another vocabulary, sizes that do not fit.
      SiteError: an unknown site, or one without a value per token.

    Example:
      `stream = ActivationStream(model, contexts.train, mi.at("resid_post", layers=15), batch_size=4096, `
      `buffer_size=262_144, key=jax.random.key(0))`, then `stream.windows(start=step)`.
    """

    def __init__(
        self,
        model: SiteModel,
        tokens: Int[np.ndarray, "context pos"] | Int[Array, "context pos"],
        sites: str | At | Sequence[str | At],
        *,
        batch_size: int,
        buffer_size: int,
        key: PRNGKeyArray,
        mask: Bool[np.ndarray, "context pos"] | None = None,
        special_ids: SupportsIndex | Iterable[SupportsIndex] = (),
        skip_positions: int = 1,
        outlier_ratio: float | None = 10.0,
        contexts_per_chunk: int = 32,
        dtype: Any = None,
        mesh: Mesh | None = None,
    ):
        source = ModelSource(
            model,
            tokens,
            sites,
            mask=mask,
            special_ids=special_ids,
            skip_positions=skip_positions,
            outlier_ratio=outlier_ratio,
            contexts_per_chunk=contexts_per_chunk,
            dtype=dtype,
            mesh=mesh,
        )
        super().__init__(source, batch_size=batch_size, buffer_size=buffer_size, key=key, mesh=mesh)
