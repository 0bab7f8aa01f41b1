"""What a format can hold, and why it cannot hold a dictionary."""

import dataclasses
import math

import numpy as np

from mi_jax.decomposition.activations import JumpReLU
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model
from mi_jax.decomposition.token_norm import TokenNorm

# what an activation with a threshold per latent is outside training
THRESHOLDED = ("ReLU", "JumpReLU", "BatchTopK")
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Holds:
    """What a format has room for.

    Attributes:
      activations: names of classes.
      cross_layer: cross-layer transcoders, and no others.
      token_norms: kinds of normalisation per token.
      centred: what the encoder reads; None for either. A dictionary of the other kind is rewritten where its encoder is
        one matrix product.
      skip: a linear path beside the codes.
      widths: an output of another width than the input.
      sites: crosscoders.
      rectified: readers take max(h, 0) before the threshold.
    """

    activations: tuple[str, ...]
    cross_layer: bool = False
    token_norms: tuple[str, ...] = ()
    centred: bool | None = None
    skip: bool = False
    widths: bool = False
    sites: bool = False
    rectified: bool = True

    def lacks(self, model: Model) -> str:
        """What of a dictionary has no place in the format; empty where all has."""
        if isinstance(model, CrossLayerTranscoder) != self.cross_layer:
            return "single dictionaries" if self.cross_layer else "cross-layer transcoders"
        name = type(model.activation).__name__
        if name not in self.activations:
            return f"the activation {name}"
        if model.w_skip is not None and not self.skip:
            return "a skip connection"
        if (
            self.rectified
            and isinstance(model.activation, JumpReLU)
            and np.asarray(model.activation.threshold).min() < 0
        ):
            return "a threshold below 0"
        return "" if isinstance(model, CrossLayerTranscoder) else self._lacks_of_one(model)

    def _lacks_of_one(self, model: Dictionary) -> str:
        if model.token_norm is not None and not _known(model.token_norm, self.token_norms):
            return f"the token norm {model.token_norm.kind} with eps={model.token_norm.eps:g}"
        if model.n_sites > 1 and not self.sites:
            return "a crosscoder's sites"
        if model.d_in != model.d_out and not self.widths:
            return "an output of another width than the input"
        if self.centred and not model.centred and model.d_in != model.d_out:
            return "an encoder that reads x itself"
        return ""


def _known(norm: TokenNorm, kinds: tuple[str, ...]) -> bool:
    """Unit norms are written without eps, which a norm of any size drowns out."""
    return norm.kind in kinds and (norm.eps == EPS if norm.kind == "layer_norm" else norm.eps <= EPS)


def sample_deviation_scale(norm: TokenNorm | None, d_in: int) -> float:
    """Factor between tokens divided by their own standard deviation as `norm` has it and by the sample's."""
    if norm is None or norm.kind != "layer_norm" or norm.ddof == 1:
        return 1.0
    return math.sqrt(d_in / (d_in - 1))
