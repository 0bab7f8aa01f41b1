"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, TopK, autoencoders and transcoders.

Both weight matrices are stored one row per latent; the skip is stored [d_out, d_in].

Source: https://github.com/EleutherAI/sparsify 1.3.3.
"""

import os
from collections.abc import Mapping
from typing import Any

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import AbsTopK, TopK
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model, dictionary, host
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, field, write_tensors
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

FILES = ("cfg.json", "sae.safetensors")
# versions that know a signed TopK are gone; today's would read it as TopK
_HOLDS = Holds(("TopK",), skip=True)


def _recognises(place: Place) -> bool:
    return place.has(*FILES)


def _load(place: Place, options: Options) -> Dictionary:
    """An autoencoder, a transcoder or a skip transcoder."""
    options.none_but(format="sparsify")
    where = place.join(FILES[0])
    config = place.json(FILES[0])
    tensors = place.tensors(FILES[1])
    if field(config, "n_targets", int, where, default=0) > 0:
        raise CheckpointError(f"{place.folder}: one layer of a cross-layer transcoder; load the folder above it")
    w_enc = tensors.take("encoder.weight", None, field(config, "d_in", int, where))
    d_sae, d_in = w_enc.shape
    return dictionary(
        w_enc=w_enc,
        b_enc=tensors.take("encoder.bias", d_sae),
        w_dec=tensors.take("W_dec", d_sae, d_in),
        b_dec=tensors.take("b_dec", d_in),
        activation=activation_of(config, d_sae, where),
        w_skip=tensors.take("W_skip", d_in, d_in).T if config.get("skip_connection") else None,
        centred=not field(config, "transcode", bool, where, default=False),
    )


def activation_of(config: Mapping[str, Any], d_sae: int, where: str) -> TopK:
    """TopK, or the signed one of early versions.

    Raises:
      CheckpointError: another activation, or a k that is none.
    """
    activation = field(config, "activation", str, where, default="topk")
    if activation != "topk":
        raise CheckpointError(f"{where}: activation {activation!r} is not known here; topk is")
    k = counted(field(config, "k", int, where), d_sae, where)
    return AbsTopK(k) if field(config, "signed", bool, where, default=False) else TopK(k)


def _lacks(model: Model) -> str:
    return _HOLDS.lacks(model)


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, Dictionary)
    assert isinstance(model.activation, TopK)
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, model.d_sae // model.d_in),
        "normalize_decoder": False,
        "num_latents": model.d_sae,
        "k": model.activation.k,
        "multi_topk": False,
        "skip_connection": model.w_skip is not None,
        "transcode": not model.centred,
        "d_in": model.d_in,
    }
    taken = sorted(set(config) & set(metadata))
    if taken:
        raise InputError(f"metadata has {', '.join(taken)}, which the configuration itself says; leave it out")
    arrays = {
        "encoder.weight": host(model.encoder),
        "encoder.bias": host(model.b_enc),
        "W_dec": host(model.w_dec),
        "b_dec": host(model.b_dec),
    }
    if model.w_skip is not None:
        arrays["W_skip"] = host(model.w_skip.T)
    write_tensors(os.path.join(folder, FILES[1]), arrays)
    write_json(os.path.join(folder, FILES[0]), config | dict(metadata))


FORMAT = Format(
    "sparsify (EleutherAI)",
    "cfg.json, sae.safetensors",
    _recognises,
    _load,
    _lacks,
    _write,
)
