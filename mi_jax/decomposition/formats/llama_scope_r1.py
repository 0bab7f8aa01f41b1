"""Llama Scope R1: `config.json` and `sae_weights.safetensors`, with `encoder.weight` and `log_jumprelu_threshold`.

The thresholds are on pre-activations of scaled activations, unlike Llama Scope's: they are divided by the scale when it
is folded.

Source: https://huggingface.co/OpenMOSS-Team/Llama-Scope-R1-Distill.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
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
from mi_jax.decomposition.formats.holds import THRESHOLDED, Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, field, write_tensors
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

_FILES = ("config.json", "sae_weights.safetensors")
_NORM = "dataset_average_activation_norm."
_HOLDS = Holds(THRESHOLDED)


def _recognises(place: Place) -> bool:
    return place.has(*_FILES) and "encoder.weight" in place.tensors(_FILES[1])


def _load(place: Place, options: Options) -> Dictionary:
    """An autoencoder, the scale of its activations folded."""
    options.none_but("scale", format="llama_scope_r1")
    where = place.join(_FILES[0])
    config = place.json(_FILES[0])
    tensors = place.tensors(_FILES[1])
    w_enc = tensors.take("encoder.weight", None, field(config, "d_model", int, where))
    d_sae, d_in = w_enc.shape
    model = dictionary(
        w_enc=w_enc,
        b_enc=tensors.take("encoder.bias", d_sae),
        w_dec=tensors.take("decoder.weight", d_in, d_sae).T,
        b_dec=tensors.take("decoder.bias", d_in),
        activation=jumprelu(np.exp(tensors.take("log_jumprelu_threshold", d_sae, bounded=False))),
        centred=False,
    )
    if field(config, "sparsity_include_decoder_norm", bool, where, default=False):
        model = ranked_by_norm(model)
    scale = options.scale
    if scale is None:
        scale = dataset_scale(config, tensors, "hook_point_in", d_in, where)
    return read_scaled(model, scale)


def dataset_scale(config: Mapping[str, Any], tensors: Tensors, hook: str, d_in: int, where: str) -> float:
    """√d_model / the average norm of a hook point's activations.

    Raises:
      CheckpointError: activations are to be scaled, but by what is not in the file.
    """
    kind = field(config, "norm_activation", str, where, default="dataset-wise")
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        raise CheckpointError(f"{where}: norm_activation {kind!r} needs other activations than a token's own")
    name = _NORM + field(config, hook, str, where)
    if name not in tensors:
        raise CheckpointError(
            f"{tensors.path}: no tensor {name!r}, the average norm of the activations that it was trained on. Give "
            "scale=√d_model / (that norm), or scale=1.0 to read activations as they are"
        )
    return math.sqrt(d_in) / tensors.number(name)


def _lacks(model: Model) -> str:
    reason = _HOLDS.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    # the logarithm of a threshold is stored
    return "" if thresholds(model).min() > 0 else "a threshold of 0"


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, Dictionary)
    model = centred_as(model, False)
    config = {
        "d_model": model.d_in,
        "expansion_factor": model.d_sae / model.d_in,
        "hook_point_in": "",
        "hook_point_out": "",
        "act_fn": "jumprelu",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }
    arrays = {
        "encoder.weight": host(model.encoder),
        "encoder.bias": host(model.b_enc),
        "decoder.weight": host(model.w_dec.T),
        "decoder.bias": host(model.b_dec),
        "log_jumprelu_threshold": np.log(thresholds(model)),
    }
    write_tensors(os.path.join(folder, _FILES[1]), arrays)
    write_json(os.path.join(folder, _FILES[0]), config | dict(metadata))


FORMAT = Format(
    "Llama Scope R1",
    "config.json, sae_weights.safetensors of encoder.weight",
    _recognises,
    _load,
    _lacks,
    _write,
)
