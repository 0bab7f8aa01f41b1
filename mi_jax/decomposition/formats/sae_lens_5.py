"""SAELens before version 6: the same tensors, and a flat configuration. Reading is `sae_lens`'s."""

import os
from collections.abc import Mapping
from typing import Any

from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.formats import sae_lens
from mi_jax.decomposition.formats.equivalent import Model
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.place import write_tensors
from mi_jax.models.checkpoints.writer import write_json

_ARCHITECTURES = {"ReLU": "standard", "Gated": "gated", "JumpReLU": "jumprelu", "BatchTopK": "jumprelu", "TopK": "topk"}


def _lacks(model: Model) -> str:
    reason = sae_lens.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    if model.w_skip is not None or model.d_in != model.d_out:
        return "transcoders"
    name = type(model.activation).__name__
    return "" if name in _ARCHITECTURES else f"the activation {name}"


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    config, arrays = sae_lens.contents(model)
    k = config.pop("k", None)
    config.pop("rescale_acts_by_decoder_norm", None)
    flat = {
        "architecture": "standard" if k is not None else config.pop("architecture"),
        "activation_fn_str": "relu" if k is None else "topk",
        "activation_fn_kwargs": {} if k is None else {"k": k},
        "finetuning_scaling_factor": False,
        "hook_name": "",
        "model_name": "",
        "prepend_bos": True,
        "context_size": 1024,
    }
    write_tensors(os.path.join(folder, sae_lens.FILES[1]), arrays)
    write_json(os.path.join(folder, sae_lens.FILES[0]), config | flat | dict(metadata))


# `sae_lens` recognises both
FORMAT = Format(
    "SAELens before 6", "cfg.json, sae_weights.safetensors", lambda place: False, sae_lens.load, _lacks, _write
)
