"""The configuration of SAELens, in the words of version 6."""

from collections.abc import Mapping
from typing import Any

from mi_jax.core.errors import InputError
from mi_jax.decomposition.activations import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    TopK,
)
from mi_jax.decomposition.dictionary import Dictionary
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, field
from mi_jax.decomposition.formats.pursuit import PursuitUntilRepeat
from mi_jax.models.checkpoints.errors import CheckpointError

ARCHITECTURES = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "abstopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
_NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening")
_SCALER = "activation_scaler.json"


def settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with the names, defaults and architectures of version 6.

    Raises:
      CheckpointError: an architecture, normalisation or activation function that is not known.
    """
    metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    version = str(config.get("sae_lens_version") or (metadata or {}).get("sae_lens_version") or "0")
    found = dict(config)
    if int("".join(c for c in version.split(".")[0] if c.isdigit()) or 0) < 6:
        found = _of_version_6(found, where)
    architecture = field(found, "architecture", str, where)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {architecture!r} is not known here; known are {', '.join(ARCHITECTURES)}"
        )
    norm = field(found, "normalize_activations", str, where, default="none")
    if norm not in _NORMALISATIONS:
        raise CheckpointError(
            f"{where}: normalize_activations is {norm!r}, which is not known here; known are "
            f"{', '.join(_NORMALISATIONS)}"
        )
    found["normalize_activations"] = norm
    found["apply_b_dec_to_input"] = field(found, "apply_b_dec_to_input", bool, where, default=True)
    training = architecture.endswith("batchtopk")
    found["rescale_acts_by_decoder_norm"] = architecture.endswith("topk") and field(
        found, "rescale_acts_by_decoder_norm", bool, where, default=training
    )
    return found


def _of_version_6(config: dict[str, Any], where: str) -> dict[str, Any]:
    names = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    found = {names.get(name, name): value for name, value in config.items()}
    function = field(found, "activation_fn", str, where, default="relu")
    arguments = field(found, "activation_fn_kwargs", dict, where, default={})
    if function not in ("relu", "topk"):
        raise CheckpointError(f"{where}: activation_fn is {function!r}, which is not known here; relu and topk are")
    found["architecture"] = found.get("architecture") or "standard"
    if function == "topk":
        if "k" not in arguments:
            raise CheckpointError(f"{where}: activation_fn is topk, but activation_fn_kwargs has no k")
        if found["architecture"] not in ("standard", "topk"):
            raise CheckpointError(f"{where}: architecture {found['architecture']!r} with a topk is not known here")
        found |= {"architecture": "topk", "k": arguments["k"]}
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if found["normalize_activations"] else "none"
    return found


def input_scale(config: Mapping[str, Any], place: Place, options: Options) -> float:
    """What activations are to be multiplied with, of the average norm that a training estimated.

    Raises:
      CheckpointError: the configuration says that there is one, but neither the folder nor the caller has it.
    """
    if config["normalize_activations"] != "expected_average_only_in":
        if options.scale is not None:
            raise InputError(f"{place.folder}: scale= is for normalize_activations='expected_average_only_in' only")
        return 1.0
    if options.scale is not None:
        return options.scale
    if _SCALER in place.names:
        return field(place.json(_SCALER), "scaling_factor", float, place.join(_SCALER), default=1.0)
    raise CheckpointError(
        f"{place.folder}: it was trained on activations scaled to an average norm of √d_in, and the scale is not in "
        "the folder. Give scale=√d_in / (mean norm of the activations), or scale=1.0 to read activations as they are"
    )


def described(model: Dictionary, dtype: str, norm: str) -> dict[str, Any]:
    """The configuration of a dictionary, in version 6."""
    activation = model.activation
    thresholded = isinstance(activation, JumpReLU | BatchTopK)
    config: dict[str, Any] = {
        "d_in": model.d_in,
        "d_sae": model.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": model.centred,
        "normalize_activations": norm,
        "reshape_activations": "none",
    }
    if model.w_skip is not None or model.d_in != model.d_out:
        kind = "transcoder" if model.w_skip is None else "skip_transcoder"
        return config | {"architecture": f"jumprelu_{kind}" if thresholded else kind, "d_out": model.d_out}
    if thresholded:
        return config | {"architecture": "jumprelu"}
    match activation:
        case Gated():
            return config | {"architecture": "gated"}
        case TopK():
            name = "abstopk" if isinstance(activation, AbsTopK) else "topk"
            return config | {"architecture": name, "k": activation.k, "rescale_acts_by_decoder_norm": False}
        case MatchingPursuit():
            return config | {
                "architecture": "matching_pursuit",
                "max_iterations": activation.k,
                "residual_threshold": activation.tolerance,
                "stop_on_duplicate_support": isinstance(activation, PursuitUntilRepeat),
            }
        case _:
            return config | {"architecture": "standard"}
