"""Dictionaries before training."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.decomposition.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    Switch,
    TopK,
)
from mi_jax.decomposition.config import DictionaryConfig
from mi_jax.decomposition.dictionary import Dictionary


def init(config: DictionaryConfig, *, key: Array, mean: Float[Array, " d_out"] | None = None) -> Dictionary:
    """Random decoder rows of unit norm, encoder equal to the decoder where the widths allow it, no encoder bias.

    A crosscoder's rows have unit norm over all its sites. A skip starts at zero.

    Args:
      config: the dictionary's shape.
      key: draws the directions.
      mean: start of b_dec; zero if not given.
    """
    k_dec, k_enc, k_act = jax.random.split(key, 3)
    d_in, d_out, d_sae = config.d_in, config.width_out, config.d_sae
    w_dec = unit_rows(jax.random.normal(k_dec, (d_sae, d_out)))
    w_enc = unit_rows(jax.random.normal(k_enc, (d_sae, d_in))) if config.transcoder else w_dec
    return Dictionary(
        w_enc=None if config.activation == "matching_pursuit" else w_enc,
        b_enc=jnp.zeros(d_sae),
        w_dec=w_dec,
        b_dec=jnp.zeros(d_out) if mean is None else mean,
        activation=init_activation(config, key=k_act),
        w_skip=jnp.zeros((d_in, d_out)) if config.skip else None,
        centred=not config.transcoder,
        n_sites=config.n_sites,
    )


def init_activation(config: DictionaryConfig, *, key: Array) -> Activation:
    """The activation that a configuration names, with its parameters."""
    d_sae, dense = config.d_sae, {"max_active": config.max_active}
    match config.activation:
        case "relu":
            return ReLU(**dense)
        case "gated":
            return Gated(r_mag=jnp.zeros(d_sae), b_mag=jnp.zeros(d_sae), **dense)
        case "jumprelu":
            return JumpReLU(jnp.full(d_sae, config.threshold, jnp.float32), bandwidth=config.bandwidth, **dense)
        case "topk":
            return TopK(config.k)
        case "abstopk":
            return AbsTopK(config.k)
        case "batchtopk":
            return BatchTopK(threshold=jnp.zeros(()), k=config.k)
        case "matching_pursuit":
            return MatchingPursuit(config.k)
        case _:
            router = unit_rows(jax.random.normal(key, (config.n_experts, config.d_in)))
            return Switch(router=router, b_router=jnp.zeros(config.d_in), k=config.k)


def unit_rows(w: Float[Array, "row width"]) -> Float[Array, "row width"]:
    """Every row divided by its norm."""
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-8)


@eqx.filter_jit
def match_size(dictionary: Dictionary, x: Float[Array, "token d_in"], y: Float[Array, "token d_out"]) -> Dictionary:
    """Scales the encoder so that the first reconstructions of `y` have the size that fits best."""
    if dictionary.w_enc is None:
        return dictionary
    centred = y - dictionary.b_dec[None, :]
    guess = dictionary(x) - dictionary.b_dec[None, :]
    along = (centred * guess).sum() / jnp.maximum((guess * guess).sum(), 1e-30)
    # a random transcoder's output need not point along `y` at all
    size = jnp.sqrt((centred * centred).sum() / jnp.maximum((guess * guess).sum(), 1e-30))
    factor = jnp.where(along > 0.05 * size, along, 0.1 * size)
    return eqx.tree_at(lambda d: d.w_enc, dictionary, dictionary.w_enc * factor)
