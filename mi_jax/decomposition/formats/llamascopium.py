"""Llamascopium 2: `config.json` and `sae_weights.safetensors` (or `.pt`), for single dictionaries and crosscoders.

Nothing is taken off the input. Activations are scaled to an average norm of √d_model and, unless the configuration says
otherwise, the activation function reads pre-activations times the norms of the decoder's rows; both are folded.

Source: https://github.com/OpenMOSS/Llamascopium, version 2.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import Activation, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats import llamascopium_clt
from mi_jax.decomposition.formats.equivalent import (
    Model,
    centred_as,
    dictionary,
    host,
    jumprelu,
    ranked_by_norm,
    read_scaled,
    thresholds,
)
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.llama_scope_r1 import dataset_scale
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, field, write_tensors
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.decomposition.token_norm import TokenNorm
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

CONFIG, WEIGHTS, TORCH = "config.json", "sae_weights.safetensors", "sae_weights.pt"
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_HOLDS = Holds(("ReLU", "JumpReLU", "BatchTopK", "TopK"), token_norms=("unit_norm",), sites=True)


def _recognises(place: Place) -> bool:
    if place.has(CONFIG, WEIGHTS):
        return "W_E" in place.tensors(WEIGHTS)
    return place.has(CONFIG, TORCH)


def _load(place: Place, options: Options) -> Model:
    """An autoencoder or transcoder, a crosscoder or a cross-layer transcoder."""
    options.none_but(format="llamascopium")
    where = place.join(CONFIG)
    config = place.json(CONFIG)
    tensors = place.tensors(WEIGHTS) if WEIGHTS in place.names else place.torch(TORCH)[0].under("sae.")
    if field(config, "use_glu_encoder", bool, where, default=False):
        raise CheckpointError(f"{where}: an encoder with a gated linear unit, which is not known here")
    kind = field(config, "sae_type", str, where, default="sae")
    if kind == "clt":
        return llamascopium_clt.load(config, tensors, where)
    if kind == "crosscoder":
        return _crosscoder(config, tensors, where)
    if kind != "sae":
        raise CheckpointError(f"{where}: sae_type {kind!r} is not known here; sae, crosscoder and clt are")
    return _single(config, tensors, where)


def _single(config: Mapping[str, Any], tensors: Tensors, where: str) -> Dictionary:
    w_enc = tensors.take("W_E", None, None)
    d_in, d_sae = w_enc.shape
    w_dec = tensors.take("W_D", d_sae, d_in)
    token_wise = config.get("norm_activation") == "token-wise"
    if token_wise and config.get("hook_point_in") != config.get("hook_point_out"):
        raise CheckpointError(f"{where}: outputs normalised by norms of their own, which an input does not give")
    model = dictionary(
        w_enc=w_enc.T,
        b_enc=tensors.take("b_E", d_sae),
        w_dec=w_dec,
        b_dec=tensors.take("b_D", d_in) if config.get("use_decoder_bias", True) else np.zeros(d_in),
        activation=activation_of(config, tensors, d_sae, where),
        token_norm=TokenNorm("unit_norm", eps=0.0) if token_wise else None,
        centred=False,
    )
    if field(config, "sparsity_include_decoder_norm", bool, where, default=True):
        model = ranked_by_norm(model)
    if token_wise:
        return model
    scale_in, scale_out = (
        dataset_scale(config, tensors, hook, d_in, where) for hook in ("hook_point_in", "hook_point_out")
    )
    return read_scaled(model, scale_in, scale_out)


def activation_of(config: Mapping[str, Any], tensors: Tensors, d_sae: int, where: str) -> Activation:
    """The activation function of one layer.

    Raises:
      CheckpointError: one that chooses over a batch or over layers.
    """
    match field(config, "act_fn", str, where, default="relu"):
        case "relu":
            return ReLU()
        case "jumprelu":
            return jumprelu(np.exp(tensors.take(_THRESHOLD, d_sae, bounded=False)))
        case "topk":
            return TopK(counted(field(config, "top_k", int, where, default=50), d_sae, where))
        case other:
            raise CheckpointError(
                f"{where}: act_fn {other!r} chooses over a whole batch or over layers and has no threshold for a token "
                "alone; convert it to jumprelu with Llamascopium first"
            )


def _crosscoder(config: Mapping[str, Any], tensors: Tensors, where: str) -> Dictionary:
    w_enc = tensors.take("W_E", None, None, None)
    n, d_model, d_sae = w_enc.shape
    w_dec = tensors.take("W_D", n, d_sae, d_model)
    norms = np.linalg.norm(w_dec, axis=2)
    activation = activation_of(config, tensors, d_sae, where)
    if not isinstance(activation, ReLU) and np.abs(norms - norms[:1]).max() > 1e-6 * norms.max():
        raise CheckpointError(
            f"{where}: each site of this crosscoder gates a latent by the norm of its own decoder, so that it "
            f"has other codes at other sites; with {type(activation).__name__} and decoders of unequal norms there "
            "is no single code per latent"
        )
    hooks = field(config, "hook_points", list, where)
    if len(hooks) != n:
        raise CheckpointError(f"{where}: {len(hooks)} hook_points for weights of {n} sites")
    scales = np.array([dataset_scale({**config, "site": hook}, tensors, "site", d_model, where) for hook in hooks])
    biases = tensors.take("b_D", n, d_model)
    if not isinstance(activation, ReLU):
        w_enc, w_dec = w_enc * norms[0], w_dec / np.maximum(norms, 1e-30)[:, :, None]
    return dictionary(
        w_enc=(w_enc * scales[:, None, None]).transpose(2, 0, 1).reshape(d_sae, -1),
        b_enc=tensors.take("b_E", n, d_sae).sum(0) * (1.0 if isinstance(activation, ReLU) else norms[0]),
        w_dec=(w_dec / scales[:, None, None]).transpose(1, 0, 2).reshape(d_sae, -1),
        b_dec=(biases / scales[:, None]).reshape(-1),
        activation=activation,
        centred=False,
        n_sites=n,
    )


def _lacks(model: Model) -> str:
    if isinstance(model, CrossLayerTranscoder):
        return llamascopium_clt.lacks(model)
    reason = _HOLDS.lacks(model)
    if reason:
        return reason
    if isinstance(model.activation, TopK) and type(model.activation) is not TopK:
        return f"the activation {type(model.activation).__name__}"
    if model.n_sites > 1 and not isinstance(model.activation, ReLU):
        return f"a crosscoder with the activation {type(model.activation).__name__}"
    # the logarithm of a threshold is stored
    jumps = not isinstance(model.activation, ReLU | TopK)
    return "a threshold of 0" if jumps and thresholds(model).min() <= 0 else ""


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    if isinstance(model, CrossLayerTranscoder):
        config, arrays = llamascopium_clt.contents(model)
    else:
        config, arrays = _contents(centred_as(model, False))
    write_tensors(os.path.join(folder, WEIGHTS), arrays)
    write_json(os.path.join(folder, CONFIG), config | dict(metadata))


def _contents(model: Dictionary) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    n, d_model = model.n_sites, model.d_in // model.n_sites
    config: dict[str, Any] = {
        "sae_type": "sae" if n == 1 else "crosscoder",
        "d_model": d_model,
        "expansion_factor": model.d_sae / d_model,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "act_fn": "relu",
        "norm_activation": "inference" if model.token_norm is None else "token-wise",
        # a crosscoder's is always included, which ReLU does not notice
        "sparsity_include_decoder_norm": n > 1,
        "dtype": "torch." + str(model.w_dec.dtype),
    }
    arrays = {"b_E": host(model.b_enc), "b_D": host(model.b_dec)}
    if n > 1:
        config |= {"hook_points": [f"site.{i}" for i in range(n)]}
        # the biases of the sites are summed
        b_enc = jnp.concatenate([model.b_enc[None], jnp.zeros((n - 1, model.d_sae), model.b_enc.dtype)])
        arrays = {
            "W_E": host(model.encoder.reshape(model.d_sae, n, d_model).transpose(1, 2, 0)),
            "W_D": host(model.w_dec.reshape(model.d_sae, n, d_model).transpose(1, 0, 2)),
            "b_E": host(b_enc),
            "b_D": host(model.b_dec.reshape(n, d_model)),
        }
        return config, arrays
    config |= {"hook_point_in": "", "hook_point_out": ""}
    arrays |= {"W_E": host(model.encoder.T), "W_D": host(model.w_dec)}
    if isinstance(model.activation, TopK):
        config |= {"act_fn": "topk", "top_k": model.activation.k}
    elif not isinstance(model.activation, ReLU):
        config["act_fn"] = "jumprelu"
        arrays[_THRESHOLD] = np.log(thresholds(model))
    return config, arrays


FORMAT = Format(
    "Llamascopium 2",
    "config.json, sae_weights.safetensors or .pt of W_E",
    _recognises,
    _load,
    _lacks,
    _write,
)
