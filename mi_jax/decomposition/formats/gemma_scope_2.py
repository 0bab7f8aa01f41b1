"""Gemma Scope 2: `config.json` and `params.safetensors`; a cross-layer transcoder has a file for each source layer.

JumpReLU, nothing taken off the input; `affine_skip_connection` is stored [d_in, d_out].

Source: https://huggingface.co/google/gemma-scope-2.
"""

import os
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import JumpReLU
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import (
    Model,
    centred_as,
    dictionary,
    host,
    jumprelu,
    layer_thresholds,
    thresholds,
)
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import THRESHOLDED, Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, consecutive, write_tensors
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

_CONFIG, _FILE, _SKIP = "config.json", "params.safetensors", "affine_skip_connection"
_LAYERS = r".*layer_(\d+).*\.safetensors"
_HOLDS = Holds(THRESHOLDED, skip=True, widths=True)
_HOLDS_LAYERS = Holds(("ReLU", "JumpReLU"), cross_layer=True, skip=True)


def _recognises(place: Place) -> bool:
    if place.file is not None:
        return place.file.endswith(".safetensors") and "w_enc" in place.tensors(place.file)
    if _FILE in place.names:
        return "w_enc" in place.tensors(_FILE)
    files = place.numbered(_LAYERS)
    return bool(files) and "w_enc" in place.tensors(next(iter(files.values())))


def _load(place: Place, options: Options) -> Model:
    """One dictionary, or all layers of a cross-layer transcoder."""
    options.none_but(format="gemma_scope_2")
    if _CONFIG in place.names:
        architecture = place.json(_CONFIG).get("architecture", "jump_relu")
        if architecture != "jump_relu":
            raise CheckpointError(
                f"{place.join(_CONFIG)}: architecture {architecture!r} is not known here; jump_relu is"
            )
    if place.file is None and _FILE not in place.names:
        return _cross_layer(place, consecutive(place.numbered(_LAYERS), "file", place.folder))
    tensors = place.tensors(place.file or _FILE)
    w_enc = tensors.take("w_enc", None, None)
    d_in, d_sae = w_enc.shape
    if len(tensors.shape("w_dec")) == 3:
        raise CheckpointError(f"{tensors.path}: one layer of a cross-layer transcoder; load its folder, {place.folder}")
    w_dec = tensors.take("w_dec", d_sae, None)
    d_out = w_dec.shape[1]
    return dictionary(
        w_enc=w_enc.T,
        b_enc=tensors.take("b_enc", d_sae),
        w_dec=w_dec,
        b_dec=tensors.take("b_dec", d_out),
        activation=jumprelu(tensors.take("threshold", d_sae, bounded=False)),
        w_skip=tensors.take(_SKIP, d_in, d_out) if _SKIP in tensors else None,
        centred=False,
    )


def _cross_layer(place: Place, names: list[str]) -> CrossLayerTranscoder:
    files = [place.tensors(name) for name in names]
    d_in, d_sae = files[0].shape("w_enc", 2)
    n, (d_out,) = len(files), files[0].shape("b_dec", 1)

    def stacked(take) -> jnp.ndarray:
        return jnp.asarray(np.stack([take(file) for file in files]))

    # of the decoder's n targets, those before the source are never written to
    decoders = (file.take("w_dec", d_sae, n, d_out)[:, i:] for i, file in enumerate(files))
    skips = [_SKIP in file for file in files]
    if any(skips) and not all(skips):
        raise CheckpointError(f"{place.folder}: some of its layers have an {_SKIP} and some have none")
    return CrossLayerTranscoder(
        w_enc=stacked(lambda file: file.take("w_enc", d_in, d_sae).T),
        b_enc=stacked(lambda file: file.take("b_enc", d_sae)),
        w_dec=tuple(jnp.asarray(w) for w in decoders),
        b_dec=stacked(lambda file: file.take("b_dec", d_out)),
        activation=layers_of_jumprelu([_threshold(file, d_sae) for file in files]),
        w_skip=stacked(lambda file: file.take(_SKIP, d_in, d_out)) if all(skips) else None,
    )


def _threshold(file: Tensors, d_sae: int) -> np.ndarray:
    return np.maximum(file.take("threshold", d_sae, bounded=False), 0.0)


def layers_of_jumprelu(thresholds: list[np.ndarray]) -> JumpReLU:
    """JumpReLU with a leading layer axis."""
    return eqx.filter_vmap(JumpReLU)(jnp.asarray(np.stack(thresholds), jnp.float32))


def _lacks(model: Model) -> str:
    return (_HOLDS_LAYERS if isinstance(model, CrossLayerTranscoder) else _HOLDS).lacks(model)


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    config = {"architecture": "jump_relu", "affine_connection": model.w_skip is not None, "model_name": ""}
    write_json(os.path.join(folder, _CONFIG), config | dict(metadata))
    if isinstance(model, Dictionary):
        model = centred_as(model, False)
        arrays = {
            "w_enc": host(model.encoder.T),
            "w_dec": host(model.w_dec),
            "b_enc": host(model.b_enc),
            "b_dec": host(model.b_dec),
            "threshold": thresholds(model),
        }
        write_tensors(os.path.join(folder, _FILE), arrays | _skip(model.w_skip))
        return
    model, n = model.untied(), model.n_layers
    bounds = layer_thresholds(model)
    for i in range(n):
        decoder = jnp.pad(model.w_dec[i], ((0, 0), (i, 0), (0, 0)))
        arrays = {
            "w_enc": host(model.w_enc[i].T),
            "w_dec": host(decoder),
            "b_enc": host(model.b_enc[i]),
            "b_dec": host(model.b_dec[i]),
            "threshold": bounds[i],
        }
        skip = _skip(None if model.w_skip is None else model.w_skip[i])
        write_tensors(os.path.join(folder, f"params_layer_{i}.safetensors"), arrays | skip)


def _skip(w_skip) -> dict[str, np.ndarray]:
    return {} if w_skip is None else {_SKIP: host(w_skip)}


FORMAT = Format(
    "Gemma Scope 2",
    "config.json, params.safetensors or …layer_0….safetensors of w_enc",
    _recognises,
    _load,
    _lacks,
    _write,
)
