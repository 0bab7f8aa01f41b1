"""Gemma Scope 1: `params.npz`, JumpReLU, nothing taken off the input.

The autoencoders of embeddings, in a folder `embedding`, were trained on embeddings multiplied by √d_model.

Source: https://huggingface.co/google/gemma-scope; Lieberum et al. 2024 (arXiv 2408.05147).
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mi_jax.core.errors import InputError
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.equivalent import Model, centred_as, dictionary, host, jumprelu, thresholds
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import THRESHOLDED, Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place
from mi_jax.decomposition.formats.tensors import Tensors

FILE = "params.npz"
_HOLDS = Holds(THRESHOLDED, widths=True)


def _recognises(place: Place) -> bool:
    return place.has(FILE) if place.file is None else place.file.endswith(".npz")


def _load(place: Place, options: Options) -> Dictionary:
    """An autoencoder or a transcoder: the file has no difference between the two."""
    options.none_but(format="gemma_scope")
    tensors = place.tensors(place.file or FILE)
    # some of the files have w_enc, some W_enc
    w_enc = tensors.take(_spelt("W_enc", tensors), None, None)
    d_in, d_sae = w_enc.shape
    w_dec = tensors.take(_spelt("W_dec", tensors), d_sae, None)
    if "scaling_factor" in tensors:
        axes = (d_sae,) if tensors.shape("scaling_factor") else ()
        w_dec = w_dec * np.broadcast_to(tensors.take("scaling_factor", *axes), (d_sae,))[:, None]
    scale = _embedding_scale(place.folder, d_in)
    return dictionary(
        w_enc=w_enc.T / scale,
        b_enc=tensors.take("b_enc", d_sae),
        w_dec=w_dec * scale,
        b_dec=tensors.take("b_dec", w_dec.shape[1]),
        activation=jumprelu(tensors.take("threshold", d_sae, bounded=False)),
        centred=False,
    )


def _spelt(name: str, tensors: Tensors) -> str:
    return name.lower() if name.lower() in tensors else name


def _embedding_scale(folder: str, d_in: int) -> float:
    """√d_model for what lies in `embedding/width_…/average_l0_…`."""
    parts = os.path.normpath(folder).split(os.sep)
    return math.sqrt(d_in) if parts[-3:-2] == ["embedding"] else 1.0


def _lacks(model: Model) -> str:
    return _HOLDS.lacks(model)


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    assert isinstance(model, Dictionary)
    if metadata:
        raise InputError("the format gemma_scope has no place for metadata; leave it out")
    model = centred_as(model, False)
    scale = np.float32(_embedding_scale(folder, model.d_in))
    arrays = {
        "W_enc": host(model.encoder.T) * scale,
        "W_dec": host(model.w_dec) / scale,
        "b_enc": host(model.b_enc),
        "b_dec": host(model.b_dec),
        "threshold": thresholds(model),
    }
    # numpy's archives have no bfloat16
    np.savez(os.path.join(folder, FILE), **{name: array.astype(np.float32) for name, array in arrays.items()})


FORMAT = Format(
    "Gemma Scope 1",
    "params.npz",
    _recognises,
    _load,
    _lacks,
    _write,
)
