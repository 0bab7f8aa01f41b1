"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`.

One threshold for all latents, on pre-activations in the units of unnormalised activations; the dictionary reads
activations scaled to an average norm of √d_model, which is folded here: the threshold is multiplied by the scale for
the weights that read scaled activations, and divided by it again with the fold.

Source: https://huggingface.co/fnlp/Llama-Scope; He et al. 2024 (arXiv 2410.20526).
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
    read_scaled,
    thresholds,
)
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import THRESHOLDED, Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, field, write_tensors
from mi_jax.models.checkpoints.writer import write_json

_CONFIG, _FILE = "hyperparams.json", os.path.join("checkpoints", "final.safetensors")
_HOLDS = Holds(THRESHOLDED)


def _recognises(place: Place) -> bool:
    return place.has(_CONFIG, "checkpoints") and os.path.isfile(place.join(_FILE))


def _load(place: Place, options: Options) -> Dictionary:
    """An autoencoder, the scales of its inputs and outputs folded."""
    options.none_but(format="llama_scope")
    where = place.join(_CONFIG)
    config = place.json(_CONFIG)
    tensors = place.tensors(_FILE)
    w_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = w_enc.shape
    norms = field(config, "dataset_average_activation_norm", dict, where)
    norm_in = field(norms, "in", float, where)
    same_site = config.get("hook_point_in") == config.get("hook_point_out", config.get("hook_point_in"))
    norm_out = norm_in if same_site else field(norms, "out", float, where)
    scale_in, scale_out = (math.sqrt(d_in) / norm for norm in (norm_in, norm_out))
    threshold = field(config, "jump_relu_threshold", float, where) * scale_in
    w_dec = tensors.take("decoder.weight", None, d_sae)
    model = dictionary(
        w_enc=w_enc,
        b_enc=tensors.take("encoder.bias", d_sae),
        w_dec=w_dec.T,
        b_dec=tensors.take("decoder.bias", w_dec.shape[0]),
        activation=jumprelu(np.full(d_sae, threshold)),
        centred=False,
    )
    return read_scaled(model, scale_in, scale_out)


def _lacks(model: Model) -> str:
    reason = _HOLDS.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    return "" if np.ptp(thresholds(model)) == 0 else "thresholds that differ between latents"


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    """With an average norm of √d_model, so that nothing is scaled."""
    assert isinstance(model, Dictionary)
    model = centred_as(model, False)
    norm = math.sqrt(model.d_in)
    config = {
        "d_model": model.d_in,
        "d_sae": model.d_sae,
        "hook_point_in": "",
        "hook_point_out": "",
        "jump_relu_threshold": float(thresholds(model)[0]),
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
    arrays = {
        "encoder.weight": host(model.encoder),
        "encoder.bias": host(model.b_enc),
        "decoder.weight": host(model.w_dec.T),
        "decoder.bias": host(model.b_dec),
    }
    os.mkdir(os.path.join(folder, "checkpoints"))
    write_tensors(os.path.join(folder, _FILE), arrays)
    write_json(os.path.join(folder, _CONFIG), config | dict(metadata))


FORMAT = Format(
    "Llama Scope",
    "hyperparams.json, checkpoints/final.safetensors",
    _recognises,
    _load,
    _lacks,
    _write,
)
