"""The same function in the terms of another format: every rewriting here changes parameters and no reconstruction."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import Activation, BatchTopK, Gated, JumpReLU
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary, fold_scale

Model = Dictionary | CrossLayerTranscoder


def dictionary(
    *,
    w_enc: np.ndarray | None,
    b_enc: np.ndarray,
    w_dec: np.ndarray,
    b_dec: np.ndarray,
    activation: Activation,
    centred: bool,
    w_skip: np.ndarray | None = None,
    **rest,
) -> Dictionary:
    """A float32 dictionary of numpy arrays."""
    return Dictionary(
        None if w_enc is None else jnp.asarray(w_enc, jnp.float32),
        jnp.asarray(b_enc, jnp.float32),
        jnp.asarray(w_dec, jnp.float32),
        jnp.asarray(b_dec, jnp.float32),
        activation,
        w_skip=None if w_skip is None else jnp.asarray(w_skip, jnp.float32),
        centred=centred,
        **rest,
    )


def jumprelu(threshold: np.ndarray, *, rectified: bool = True) -> JumpReLU:
    """JumpReLU of a threshold per latent.

    Args:
      threshold: θ.
      rectified: whether the format takes max(h, 0) first, so that a threshold below 0 is one of 0.
    """
    return JumpReLU(jnp.asarray(np.maximum(threshold, 0.0) if rectified else threshold, jnp.float32))


def ranked_by_norm(model: Dictionary) -> Dictionary:
    """Of a dictionary whose activation reads h · ‖w_dec‖ and whose codes are divided by ‖w_dec‖ again.

    The activation keeps its parameters: they are in units of h · ‖w_dec‖ already.
    """
    norms = jnp.linalg.norm(model.w_dec, axis=1)
    safe = jnp.maximum(norms, 1e-30)
    return eqx.tree_at(
        lambda d: (d.w_enc, d.b_enc, d.w_dec),
        model,
        (model.encoder * norms[:, None], model.b_enc * norms, model.w_dec / safe[:, None]),
        is_leaf=lambda leaf: leaf is None,
    )


def read_scaled(model: Dictionary, scale_in: float, scale_out: float | None = None) -> Dictionary:
    """Of a dictionary from x · scale_in to y · scale_out: the one from x to y."""
    return fold_scale(model, scale_in, None if scale_out == scale_in else scale_out)


def centred_as(model: Dictionary, centred: bool) -> Dictionary:
    """The dictionary with or without b_dec taken off its input; the encoder's biases make up for it."""
    if model.centred == centred:
        return model
    shift = model.encoder @ model.b_dec * (1.0 if centred else -1.0)
    activation = model.activation
    if isinstance(activation, Gated):
        activation = eqx.tree_at(lambda a: a.b_mag, activation, activation.b_mag + jnp.exp(activation.r_mag) * shift)
    return Dictionary(
        model.encoder,
        model.b_enc + shift,
        model.w_dec,
        model.b_dec,
        activation,
        w_skip=model.w_skip,
        token_norm=model.token_norm,
        centred=centred,
        n_sites=model.n_sites,
    )


def thresholds(model: Dictionary) -> np.ndarray:
    """θ of every latent, of the activations that are a JumpReLU outside training: ReLU and BatchTopK too."""
    match model.activation:
        case JumpReLU():
            return host(model.activation.threshold)
        case BatchTopK():
            return np.full(model.d_sae, max(float(model.activation.threshold), 0.0), np.float32)
        case _:
            return np.zeros(model.d_sae, np.float32)


def layer_thresholds(model: CrossLayerTranscoder) -> np.ndarray:
    """θ of every latent of every layer, of JumpReLU and ReLU."""
    if isinstance(model.activation, JumpReLU):
        return host(model.activation.threshold)
    return np.zeros((model.n_layers, model.d_sae), np.float32)


def host(array: jax.Array) -> np.ndarray:
    """The numbers on the host, in the type they have."""
    return np.ascontiguousarray(np.asarray(array))


def cast(model: Model, dtype) -> Model:
    """All parameters in another type, but for JumpReLU's thresholds, which stay float32."""
    changed = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)
    if isinstance(model.activation, JumpReLU):
        changed = eqx.tree_at(lambda d: d.activation, changed, model.activation)
    return changed
