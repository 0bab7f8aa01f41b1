"""OpenAI's sparse autoencoders: one torch file, ReLU or TopK; those with TopK read normalised tokens.

Source: https://github.com/openai/sparse_autoencoder.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Activation, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model, centred_as, dictionary, host, read_scaled
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds, sample_deviation_scale
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, field
from mi_jax.decomposition.formats.torch_file import write_torch
from mi_jax.decomposition.token_norm import TokenNorm
from mi_jax.models.checkpoints.errors import CheckpointError

_HOLDS = Holds(("ReLU", "TopK"), token_norms=("layer_norm",), centred=True)
_STATE = "activation_state_dict."


def _recognises(place: Place) -> bool:
    return place.file is not None and place.file.endswith(".pt") and "pre_bias" in place.torch(place.file)[0]


def _load(place: Place, options: Options) -> Dictionary:
    """An autoencoder."""
    options.none_but(format="openai")
    assert place.file is not None
    tensors, plain = place.torch(place.file)
    w_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = w_enc.shape
    kind = field(plain, "activation", str, place.path, default="ReLU")
    tied = "decoder.linear.weight" in tensors
    return dictionary(
        w_enc=w_enc,
        b_enc=tensors.take("latent_bias", d_sae),
        w_dec=w_enc if tied else tensors.take("decoder.weight", d_in, d_sae).T,
        b_dec=tensors.take("pre_bias", d_in),
        activation=_activation(kind, plain, d_sae, place.path),
        token_norm=TokenNorm("layer_norm", eps=1e-5, ddof=1) if kind == "TopK" else None,
        centred=True,
    )


def _activation(kind: str, plain: Mapping[str, Any], d_sae: int, where: str) -> Activation:
    if kind == "ReLU":
        return ReLU()
    if kind != "TopK":
        raise CheckpointError(f"{where}: activation {kind!r} is not known here; ReLU and TopK are")
    after = field(plain, f"{_STATE}postact_fn", str, where, default="ReLU")
    k = counted(field(plain, f"{_STATE}k", int, where), d_sae, where)
    if after != "ReLU":
        raise CheckpointError(f"{where}: a TopK followed by {after!r} is not known here; by ReLU it is")
    return TopK(k)


def _lacks(model: Model) -> str:
    reason = _HOLDS.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    if type(model.activation) not in (ReLU, TopK):
        return f"the activation {type(model.activation).__name__}"
    if isinstance(model.activation, TopK) == (model.token_norm is None):
        return "a TopK without layer_norm" if isinstance(model.activation, TopK) else "a ReLU with layer_norm"
    return ""


def _write(path: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, Dictionary)
    if metadata:
        raise InputError("the format openai has no place for metadata; leave it out")
    model = read_scaled(centred_as(model, True), sample_deviation_scale(model.token_norm, model.d_in))
    state: dict[str, Any] = {
        "pre_bias": host(model.b_dec),
        "latent_bias": host(model.b_enc),
        "stats_last_nonzero": np.zeros(model.d_sae, np.int64),
        "latents_activation_frequency": np.ones(model.d_sae, np.float32),
        "latents_mean_square": np.zeros(model.d_sae, np.float32),
        "encoder.weight": host(model.encoder),
        "decoder.weight": host(model.w_dec.T),
        "activation": type(model.activation).__name__,
        "activation_state_dict": {},
    }
    if isinstance(model.activation, TopK):
        state["activation_state_dict"] = {"k": model.activation.k, "postact_fn": "ReLU"}
    write_torch(path, state)


FORMAT = Format(
    "OpenAI",
    "a .pt file of pre_bias",
    _recognises,
    _load,
    _lacks,
    _write,
    suffix=".pt",
)
