"""Cross-layer transcoders of Llamascopium 2: decoders by target layer, `W_D.t` [t + 1, d_sae, d_model].

Source: https://github.com/OpenMOSS/Llamascopium, version 2.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import Activation, JumpReLU, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.formats.equivalent import Model, host, layer_thresholds
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.llama_scope_r1 import dataset_scale
from mi_jax.decomposition.formats.place import counted, field
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.models.checkpoints.errors import CheckpointError

_THRESHOLD = "activation_function.log_jumprelu_threshold"
_HOLDS = Holds(("ReLU", "JumpReLU", "TopK"), cross_layer=True)


def load(config: Mapping[str, Any], tensors: Tensors, where: str) -> CrossLayerTranscoder:
    """All layers, norms of activations and decoders folded."""
    w_enc = tensors.take("W_E", None, None, None)
    n, d_model, d_sae = w_enc.shape
    # [source target latent width]; a target before its source stays zero
    w_dec = np.zeros((n, n, d_sae, d_model), np.float32)
    for target in range(n):
        w_dec[: target + 1, target] = tensors.take(f"W_D.{target}", target + 1, d_sae, d_model)
    b_enc = tensors.take("b_E", n, d_sae)
    b_dec = np.stack([tensors.take(f"b_D.{target}", d_model) for target in range(n)])
    activation = _activation(config, tensors, n, d_sae, where)
    if field(config, "sparsity_include_decoder_norm", bool, where, default=True):
        norms = np.sqrt((w_dec**2).sum((1, 3)))
        w_enc, b_enc = w_enc * norms[:, None], b_enc * norms
        w_dec = w_dec / np.maximum(norms, 1e-30)[:, None, :, None]
    scale_in, scale_out = (_scales(config, tensors, hooks, n, d_model, where) for hooks in ("in", "out"))
    # codes stay in the units of scaled activations, in which the thresholds are
    w_enc, w_dec = w_enc * scale_in[:, None, None], w_dec / scale_out[None, :, None, None]
    return CrossLayerTranscoder(
        w_enc=jnp.asarray(w_enc.transpose(0, 2, 1), jnp.float32),
        b_enc=jnp.asarray(b_enc),
        w_dec=tuple(jnp.asarray(w_dec[i, i:].transpose(1, 0, 2), jnp.float32) for i in range(n)),
        b_dec=jnp.asarray(b_dec / scale_out[:, None], jnp.float32),
        activation=activation,
    )


def _activation(config: Mapping[str, Any], tensors: Tensors, n: int, d_sae: int, where: str) -> Activation:
    match field(config, "act_fn", str, where, default="relu"):
        case "relu":
            return ReLU()
        case "jumprelu":
            bounds = np.exp(tensors.take(_THRESHOLD, n, d_sae, bounded=False))
            return eqx.filter_vmap(JumpReLU)(jnp.asarray(bounds))
        case "topk":
            return TopK(counted(field(config, "top_k", int, where, default=50), d_sae, where))
        case other:
            raise CheckpointError(
                f"{where}: act_fn {other!r} chooses over a whole batch or over layers and has no threshold for a token "
                "and layer alone; convert it to jumprelu with Llamascopium first"
            )


def _scales(config: Mapping[str, Any], tensors: Tensors, hooks: str, n: int, d_model: int, where: str) -> np.ndarray:
    names = field(config, f"hook_points_{hooks}", list, where)
    if len(names) != n:
        raise CheckpointError(f"{where}: {len(names)} hook_points_{hooks} for weights of {n} layers")
    return np.array([dataset_scale({**config, "site": name}, tensors, "site", d_model, where) for name in names])


def lacks(model: Model) -> str:
    """What of a dictionary has no place in it."""
    reason = _HOLDS.lacks(model)
    if reason or not isinstance(model, CrossLayerTranscoder):
        return reason
    if model.d_in != model.d_out:
        return "an output of another width than the input"
    if isinstance(model.activation, TopK) and type(model.activation) is not TopK:
        return f"the activation {type(model.activation).__name__}"
    jumps = isinstance(model.activation, JumpReLU)
    return "a threshold of 0" if jumps and layer_thresholds(model).min() <= 0 else ""


def contents(model: CrossLayerTranscoder) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors."""
    model, n = model.untied(), model.n_layers
    config: dict[str, Any] = {
        "sae_type": "clt",
        "d_model": model.d_in,
        "expansion_factor": model.d_sae / model.d_in,
        "use_decoder_bias": True,
        "act_fn": "relu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "hook_points_in": [f"in.{i}" for i in range(n)],
        "hook_points_out": [f"out.{i}" for i in range(n)],
        "dtype": "torch." + str(model.w_enc.dtype),
    }
    arrays = {"W_E": host(model.w_enc.transpose(0, 2, 1)), "b_E": host(model.b_enc)}
    for target in range(n):
        decoders = [model.weights(source, target) for source in range(target + 1)]
        arrays |= {f"W_D.{target}": host(jnp.stack(decoders)), f"b_D.{target}": host(model.b_dec[target])}
    if isinstance(model.activation, TopK):
        config |= {"act_fn": "topk", "top_k": model.activation.k}
    elif isinstance(model.activation, JumpReLU):
        config["act_fn"] = "jumprelu"
        arrays[_THRESHOLD] = np.log(layer_thresholds(model))
    return config, arrays
