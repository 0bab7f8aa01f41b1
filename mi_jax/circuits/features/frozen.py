"""A decoder with frozen attention patterns and norm scales: what is left is linear from the embedding to the logits.

The first row of a batch is an ordinary run. All rows take its attention patterns and the scales of its norms.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.circuits.scores.rules import FrozenNorm
from mi_jax.models.block import Block
from mi_jax.models.config import DecoderConfig
from mi_jax.models.decoder import Decoder
from mi_jax.models.norm import Norm, normed

# where the dictionaries of MLPs may read the stream of a layer
READS = ("mlp.in", "resid_mid", "resid_pre")


class FirstRowNorm(FrozenNorm):
    """A norm whose scale is that of the first row of its input, and a constant for gradients."""

    def scale(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch #d_model"]:
        return jnp.broadcast_to(super().scale(x[:1]), (*x.shape[:-1], 1))


def with_frozen_norms(model: Decoder) -> Decoder:
    """The model with every norm frozen."""

    def freeze(leaf):
        return FirstRowNorm(leaf.weight, leaf.bias, leaf.eps, leaf.offset) if isinstance(leaf, Norm) else leaf

    return jax.tree.map(freeze, model, is_leaf=lambda leaf: isinstance(leaf, Norm))


def mlp_norm(params: Block, config: DecoderConfig) -> Norm | None:
    """The norm through which the MLP reads the stream."""
    return params.attn_norm if config.shared_norm else params.mlp_norm


class ReplacingTap:
    """Takes what a dictionary reads, puts what it writes, and holds attention patterns to those of the first row.

    Attributes:
      read: what the dictionary of this layer reads, once the layer has come there.
    """

    def __init__(self, site: str, norm: Norm | None, write, *, patterns: bool = True):
        self._site, self._norm, self._write, self._patterns = site, norm, write, patterns
        self.read: Array | None = None

    def touches(self, name: str) -> bool:
        return False

    def __call__(self, name: str, x: Array) -> Array:
        if name == "attn.pattern" and self._patterns:
            return jnp.broadcast_to(jax.lax.stop_gradient(x[:1]), x.shape)
        if name == self._site:
            self.read = normed(self._norm, x)
        if name == "mlp_out":
            return self._write(self.read, x)
        return x


class Additions(eqx.Module):
    """What is added to the stream of one prompt: to the embedding, and to the MLP output of every layer."""

    embed: Float[Array, "pos d_model"]
    mlp_out: Float[Array, "layer pos d_model"]


class Streams(eqx.Module):
    """What the dictionaries read, and the stream that is unembedded."""

    reads: Float[Array | np.ndarray, "layer pos d_model"]
    final: Float[Array | np.ndarray, "pos d_model"]
