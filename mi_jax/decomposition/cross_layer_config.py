"""Shapes of cross-layer transcoders, what they may be trained for, and their start."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.core.errors import InputError
from mi_jax.decomposition.config import DictionaryConfig, Objective, check_combination
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder, Tying
from mi_jax.decomposition.initial import init_activation, unit_rows

ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
PENALTIES = ("none", "l1", "tanh", "l0")


@dataclasses.dataclass(frozen=True)
class CrossLayerConfig:
    """Shape of a cross-layer transcoder.

    Attributes:
      d_in: width of what every layer reads.
      d_sae: latents of each layer.
      n_layers: layers read and written.
      activation: `relu`, `jumprelu`, `topk` (the k largest of each token and layer) or `batchtopk` (the k · tokens ·
        layers largest of a batch, over tokens and layers).
      k: codes per token and layer.
      d_out: width of what is predicted; None for `d_in`.
      tying: which decoders are one matrix; see `CrossLayerTranscoder`.
      skip: a linear path in each layer.
      bandwidth: of JumpReLU's straight-through gradients.
      threshold: JumpReLU's at the start, in units of inputs with unit variance per dimension.
      max_active: places per token and layer, on average, for sparse codes of ReLU and JumpReLU; None for dense ones.
    """

    d_in: int
    d_sae: int
    n_layers: int
    activation: str = "topk"
    k: int = 32
    d_out: int | None = None
    tying: Tying = "none"
    skip: bool = False
    bandwidth: float = 0.05
    threshold: float = 0.01
    max_active: int | None = None

    def __post_init__(self):
        if self.n_layers < 1:
            raise InputError(f"n_layers must be at least 1, got {self.n_layers}")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"a cross-layer transcoder is trained with {', '.join(ACTIVATIONS)}, not {self.activation!r}"
            )
        if self.tying not in ("none", "per_source", "per_target"):
            raise InputError(f"tying must be none, per_source or per_target, got {self.tying!r}")
        # its own checks are those of every layer
        _ = self.layer

    @property
    def width_out(self) -> int:
        return self.d_in if self.d_out is None else self.d_out

    @property
    def layer(self) -> DictionaryConfig:
        """One layer's encoder, and the decoder to its own output, as a transcoder."""
        shape: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("d_in", "d_sae", "activation", "k", "skip", "bandwidth", "threshold", "max_active")
        }
        return DictionaryConfig(**shape, d_out=self.width_out, transcoder=True)


def check_cross_layer(config: CrossLayerConfig, objective: Objective) -> None:
    """Refuses objectives that cross-layer transcoders do not have.

    Raises:
      InputError: names the field, its value and the values that there are.
    """
    if objective.reconstruction != "squared_error":
        raise InputError(
            f"a cross-layer transcoder does not combine with reconstruction={objective.reconstruction!r}; it does with "
            "squared_error"
        )
    if objective.penalty not in PENALTIES:
        raise InputError(
            f"a cross-layer transcoder does not combine with penalty={objective.penalty!r}; it does with "
            f"{', '.join(PENALTIES)}, as far as its activation does"
        )
    check_combination(config.layer, objective)


def init_cross_layer(
    config: CrossLayerConfig, *, key: Array, mean: Float[Array, "layer d_out"] | None = None
) -> CrossLayerTranscoder:
    """Random encoder rows of unit norm; random decoder rows of unit norm over all targets that they hold.

    Args:
      config: the shape.
      key: draws the directions.
      mean: start of b_dec; zero if not given.
    """
    k_enc, k_dec, k_act = jax.random.split(key, 3)
    n, d_sae, d_out = config.n_layers, config.d_sae, config.width_out
    targets = [n - i if config.tying == "none" else 1 for i in range(n)]
    w_dec = tuple(
        unit_rows(jax.random.normal(k, (d_sae, m * d_out))).reshape(d_sae, m, d_out)
        for k, m in zip(jax.random.split(k_dec, n), targets, strict=True)
    )
    each_layer = eqx.filter_vmap(lambda _: init_activation(config.layer, key=k_act))
    return CrossLayerTranscoder(
        w_enc=jax.vmap(unit_rows)(jax.random.normal(k_enc, (n, d_sae, config.d_in))),
        b_enc=jnp.zeros((n, d_sae)),
        w_dec=w_dec,
        b_dec=jnp.zeros((n, d_out)) if mean is None else mean,
        activation=each_layer(jnp.arange(n)),
        w_skip=jnp.zeros((n, config.d_in, d_out)) if config.skip else None,
        tying=config.tying,
    )
