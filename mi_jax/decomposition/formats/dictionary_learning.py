"""dictionary_learning: `ae.pt` and, to know the class, `config.json`.

Source: https://github.com/saprmarks/dictionary_learning.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model, centred_as, dictionary, host, jumprelu
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, field
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.decomposition.formats.torch_file import write_torch
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

_CONFIG, _FILE = "config.json", "ae.pt"
_HOLDS = Holds(("ReLU", "Gated", "JumpReLU", "TopK", "BatchTopK"), centred=True)
CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
# classes that no other has the tensors of
_TELLING = {
    "group_sizes": "MatryoshkaBatchTopKSAE",
    "gate_bias": "GatedAutoEncoder",
    "decoder.bias": "AutoEncoderNew",
    "bias": "AutoEncoder",
}


def _recognises(place: Place) -> bool:
    return _FILE in place.names and place.file in (None, _FILE, _CONFIG)


def _load(place: Place, options: Options) -> Dictionary:
    """Every class; per-token TopK stays per-token, though a threshold is saved with it."""
    options.none_but(format="dictionary_learning")
    tensors, _ = place.torch(_FILE)
    kind = _class(place, tensors)
    if kind not in CLASSES:
        raise CheckpointError(f"{place.folder}: dict_class {kind!r} is not known here; known are {', '.join(CLASSES)}")
    if "W_enc" in tensors:
        w_enc = tensors.take("W_enc", None, None).T
        d_sae, d_in = w_enc.shape
        w_dec, b_enc = tensors.take("W_dec", d_sae, d_in), tensors.take("b_enc", d_sae)
    else:
        w_enc = tensors.take("encoder.weight", None, None)
        d_sae, d_in = w_enc.shape
        w_dec = tensors.take("decoder.weight", d_in, d_sae).T
        b_enc = tensors.take("gate_bias" if kind == "GatedAutoEncoder" else "encoder.bias", d_sae)
    biases = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    return dictionary(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=tensors.take(biases.get(kind, "b_dec"), d_in),
        activation=_activation(kind, tensors, d_sae),
        centred=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )


def _class(place: Place, tensors: Tensors) -> str:
    if _CONFIG in place.names:
        where = place.join(_CONFIG)
        trainer = field(place.json(_CONFIG), "trainer", dict, where)
        return field(trainer, "dict_class", str, where)
    for name, kind in _TELLING.items():
        if name in tensors:
            return kind
    if "k" not in tensors and "W_enc" in tensors:
        return "JumpReluAutoEncoder"
    raise CheckpointError(
        f"{place.folder}: AutoEncoderTopK and BatchTopKSAE have the same tensors; config.json, which says which (as "
        "trainer.dict_class), is not there"
    )


def _activation(kind: str, tensors: Tensors, d_sae: int):
    match kind:
        case "GatedAutoEncoder":
            return Gated(jnp.asarray(tensors.take("r_mag", d_sae)), jnp.asarray(tensors.take("mag_bias", d_sae)))
        case "JumpReluAutoEncoder":
            return jumprelu(tensors.take("threshold", d_sae, bounded=False))
        case "AutoEncoderTopK":
            return TopK(counted(tensors.whole_number("k"), d_sae, tensors.path))
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            return BatchTopK(
                jnp.asarray(tensors.number("threshold"), jnp.float32),
                counted(tensors.whole_number("k"), d_sae, tensors.path),
            )
        case _:
            return ReLU()


def _lacks(model: Model) -> str:
    reason = _HOLDS.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    if isinstance(model.activation, TopK) and type(model.activation) is not TopK:
        return f"the activation {type(model.activation).__name__}"
    return ""


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, Dictionary)
    # without b_dec at the input there are classes for ReLU and JumpReLU only
    jumps, plain = (isinstance(model.activation, kind) for kind in (JumpReLU, ReLU))
    model = centred_as(model, not jumps and (model.centred or not plain))
    activation = model.activation
    linear = {"encoder.weight": host(model.encoder), "decoder.weight": host(model.w_dec.T)}
    trainer: dict[str, Any] = {"activation_dim": model.d_in, "dict_size": model.d_sae}
    b_enc, b_dec = host(model.b_enc), host(model.b_dec)
    match activation:
        case JumpReLU():
            kind = "JumpReluAutoEncoder"
            arrays = {"W_enc": host(model.encoder.T), "b_enc": b_enc, "W_dec": host(model.w_dec), "b_dec": b_dec}
            arrays |= {"threshold": host(activation.threshold)}
        case Gated():
            kind = "GatedAutoEncoder"
            arrays = linear | {"decoder_bias": b_dec, "gate_bias": b_enc}
            arrays |= {"mag_bias": host(activation.b_mag), "r_mag": host(activation.r_mag)}
        case TopK() | BatchTopK():
            kind = "AutoEncoderTopK" if isinstance(activation, TopK) else "BatchTopKSAE"
            trainer["k"] = activation.k
            threshold = host(activation.threshold) if isinstance(activation, BatchTopK) else np.array(-1.0)
            arrays = linear | {"encoder.bias": b_enc, "b_dec": b_dec}
            arrays |= {"k": np.array(activation.k, np.int32), "threshold": threshold.astype(np.float32)}
        case _:
            kind = "AutoEncoder" if model.centred else "AutoEncoderNew"
            arrays = linear | {"encoder.bias": b_enc, "bias" if model.centred else "decoder.bias": b_dec}
    write_torch(os.path.join(folder, _FILE), arrays)
    config = {"trainer": trainer | {"dict_class": kind} | dict(metadata), "buffer": {}}
    write_json(os.path.join(folder, _CONFIG), config)


FORMAT = Format(
    "dictionary_learning",
    "ae.pt, config.json",
    _recognises,
    _load,
    _lacks,
    _write,
)
