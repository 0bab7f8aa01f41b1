"""circuit-tracer's per-layer transcoders: `layer_{i}.safetensors`, both weight matrices one row per latent.

Early files have the decoder the other way round; the biases tell which way it is. The skip is stored [d_out, d_in].

Source: https://github.com/decoderesearch/circuit-tracer; https://huggingface.co/mwhanna.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import Activation, JumpReLU, ReLU, TopK
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model, centred_as, dictionary, host, jumprelu
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, write_tensors
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.models.checkpoints.errors import CheckpointError

_LAYERS = r"layer_(\d+)\.safetensors"
_THRESHOLD = "activation_function.threshold"
_HOLDS = Holds(("ReLU", "JumpReLU"), skip=True, rectified=False)


def _recognises(place: Place) -> bool:
    names = list(place.numbered(_LAYERS).values())
    if place.file:
        names = [name for name in names if name == place.file]
    return bool(names) and {"W_enc", "b_dec"} <= {*place.tensors(names[0]).names}


def _load(place: Place, options: Options) -> Dictionary:
    """The transcoder of one layer."""
    options.none_but("layer", format="circuit_tracer")
    tensors = place.tensors(place.file or _of_layer(place, options.layer))
    (d_sae,), (d_in,) = tensors.shape("b_enc", 1), tensors.shape("b_dec", 1)
    w_enc, w_dec = tensors.take("W_enc", d_sae, d_in), tensors.take("W_dec", None, None)
    if w_dec.shape == (d_in, d_sae) != (d_sae, d_in):
        w_dec = w_dec.T
    elif w_dec.shape != (d_sae, d_in):
        tensors.take("W_dec", d_sae, d_in)
    return dictionary(
        w_enc=w_enc,
        b_enc=tensors.take("b_enc", d_sae),
        w_dec=w_dec,
        b_dec=tensors.take("b_dec", d_in),
        activation=_activation(tensors, d_sae),
        w_skip=tensors.take("W_skip", d_in, d_in).T if "W_skip" in tensors else None,
        centred=False,
    )


def _of_layer(place: Place, layer: int | None) -> str:
    files = place.numbered(_LAYERS)
    if layer not in files:
        asked = "give layer=" if layer is None else f"there is no layer {layer}; give layer="
        raise CheckpointError(f"{place.folder}: has transcoders of layers {', '.join(map(str, files))}: {asked}")
    return files[layer]


def _activation(tensors: Tensors, d_sae: int) -> Activation:
    if _THRESHOLD in tensors:
        shape = tensors.shape(_THRESHOLD)
        threshold = tensors.take(_THRESHOLD, *shape, bounded=False)
        if threshold.size not in (1, d_sae):
            raise CheckpointError(
                f"{tensors.path}: {_THRESHOLD!r} has shape {shape}, it was to be 1 or {d_sae} numbers"
            )
        return jumprelu(np.broadcast_to(threshold.reshape(-1), (d_sae,)), rectified=False)
    return TopK(counted(tensors.whole_number("k"), d_sae, tensors.path)) if "k" in tensors else ReLU()


def _lacks(model: Model) -> str:
    return _HOLDS.lacks(model)


def _write(path: str, model: Model, metadata: Mapping[str, Any]) -> None:
    """One file; circuit-tracer finds a set of them through a config.yaml of its own."""
    assert isinstance(model, Dictionary)
    if not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("metadata of circuit_tracer files are texts by name")
    model = centred_as(model, False)
    arrays = {
        "W_enc": host(model.encoder),
        "W_dec": host(model.w_dec),
        "b_enc": host(model.b_enc),
        "b_dec": host(model.b_dec),
    }
    if model.w_skip is not None:
        arrays["W_skip"] = host(model.w_skip.T)
    if isinstance(model.activation, JumpReLU):
        arrays[_THRESHOLD] = host(model.activation.threshold)
    write_tensors(path, arrays, {"format": "pt"} | dict(metadata))


FORMAT = Format(
    "circuit-tracer, per layer",
    "layer_0.safetensors of W_enc",
    _recognises,
    _load,
    _lacks,
    _write,
    suffix=".safetensors",
)
