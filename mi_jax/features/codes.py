"""Sparse codes of a corpus: which latents fire where, kept as k pairs a token."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mi_jax.decomposition.dictionary import Dictionary


@dataclasses.dataclass(frozen=True)
class Codes:
    """Values and latent indices of every token of every context; position 0 of a context holds zeros.

    Attributes:
      tokens: the text, `[context pos]`.
    """

    tokens: Int[np.ndarray, "context pos"]
    values: Float[np.ndarray, "context pos k"]
    indices: Int[np.ndarray, "context pos k"]

    def activations(self, latents: Int[np.ndarray, " latent"]) -> Float[np.ndarray, "latent context pos"]:
        """Dense activations of a few latents."""
        return np.stack([np.where(self.indices == latent, self.values, 0).sum(-1) for latent in latents])

    def density(self, d_sae: int) -> Float[np.ndarray, " d_sae"]:
        """Fraction of tokens at which each latent fires, position 0 left out."""
        fired = self.indices[:, 1:][self.values[:, 1:] > 0]
        return np.bincount(fired, minlength=d_sae) / (self.tokens.size - len(self.tokens))


def encode_contexts(sae: Dictionary, stream: Float[np.ndarray, "context pos d_model"], tokens: np.ndarray) -> Codes:
    """Codes of a captured stream, in chunks; position 0 is set to zero."""
    values, indices = [], []
    for start in range(0, len(stream), 64):
        v, i = sae.encode_sparse(jnp.asarray(stream[start : start + 64]))
        values.append(np.array(v))
        indices.append(np.array(i))
    all_values = np.concatenate(values)
    all_values[:, 0] = 0
    return Codes(tokens, all_values, np.concatenate(indices))
