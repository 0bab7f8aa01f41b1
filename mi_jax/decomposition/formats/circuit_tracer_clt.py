"""circuit-tracer's cross-layer transcoders: `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors` by source layer.

The skip is stored [d_in, d_out], unlike that of per-layer transcoders.

Source: https://github.com/decoderesearch/circuit-tracer.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import JumpReLU, ReLU
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.formats.equivalent import Model, host, layer_thresholds
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, consecutive, write_tensors
from mi_jax.models.checkpoints.errors import CheckpointError

_ENCODERS, _DECODERS = r"W_enc_(\d+)\.safetensors", r"W_dec_(\d+)\.safetensors"
_HOLDS = Holds(("ReLU", "JumpReLU"), cross_layer=True, skip=True, rectified=False)


def _recognises(place: Place) -> bool:
    return place.file is None and bool(place.numbered(_ENCODERS))


def _load(place: Place, options: Options) -> CrossLayerTranscoder:
    """All layers."""
    options.none_but(format="circuit_tracer_clt")
    encoders = [place.tensors(name) for name in consecutive(place.numbered(_ENCODERS), "W_enc file", place.folder)]
    decoders = [place.tensors(name) for name in consecutive(place.numbered(_DECODERS), "W_dec file", place.folder)]
    n = len(encoders)
    if len(decoders) != n:
        raise CheckpointError(f"{place.folder}: encoders of {n} layers and decoders of {len(decoders)}")
    d_sae, d_in = encoders[0].shape("W_enc_0", 2)
    (d_out,) = encoders[0].shape("b_dec_0", 1)

    def stacked(name: str, *shape: int) -> np.ndarray:
        return np.stack([file.take(f"{name}_{i}", *shape, bounded=False) for i, file in enumerate(encoders)])

    def everywhere(name: str) -> bool:
        there = [f"{name}_{i}" in file for i, file in enumerate(encoders)]
        if any(there) and not all(there):
            raise CheckpointError(f"{place.folder}: some of its layers have a {name} and some have none")
        return all(there)

    bounds = jnp.asarray(stacked("threshold", d_sae)) if everywhere("threshold") else None
    return CrossLayerTranscoder(
        w_enc=jnp.asarray(stacked("W_enc", d_sae, d_in)),
        b_enc=jnp.asarray(stacked("b_enc", d_sae)),
        w_dec=tuple(jnp.asarray(f.take(f"W_dec_{i}", d_sae, n - i, d_out)) for i, f in enumerate(decoders)),
        b_dec=jnp.asarray(stacked("b_dec", d_out)),
        activation=ReLU() if bounds is None else eqx.filter_vmap(JumpReLU)(bounds),
        w_skip=jnp.asarray(stacked("W_skip", d_in, d_out)) if everywhere("W_skip") else None,
    )


def _lacks(model: Model) -> str:
    return _HOLDS.lacks(model)


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, CrossLayerTranscoder)
    model, bounds = model.untied(), layer_thresholds(model)
    for i in range(model.n_layers):
        arrays = {
            f"W_enc_{i}": host(model.w_enc[i]),
            f"b_enc_{i}": host(model.b_enc[i]),
            f"b_dec_{i}": host(model.b_dec[i]),
        }
        if isinstance(model.activation, JumpReLU):
            arrays[f"threshold_{i}"] = bounds[i]
        if model.w_skip is not None:
            arrays[f"W_skip_{i}"] = host(model.w_skip[i])
        write_tensors(os.path.join(folder, f"W_enc_{i}.safetensors"), arrays)
        write_tensors(os.path.join(folder, f"W_dec_{i}.safetensors"), {f"W_dec_{i}": host(model.w_dec[i])})
    config = {
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    # JSON texts are YAML too
    lines = (f"{name}: {json.dumps(value)}\n" for name, value in (config | dict(metadata)).items())
    with open(os.path.join(folder, "config.yaml"), "w", encoding="utf-8") as file:
        file.writelines(lines)


FORMAT = Format(
    "circuit-tracer, cross-layer",
    "W_enc_0.safetensors, W_dec_0.safetensors",
    _recognises,
    _load,
    _lacks,
    _write,
)
