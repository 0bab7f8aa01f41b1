"""SAELens: a folder of `cfg.json` and `sae_weights.safetensors`, of version 6 or before.

Source: https://github.com/decoderesearch/SAELens 6.54.12.
"""

import os
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
)
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
from mi_jax.decomposition.formats.holds import Holds, sample_deviation_scale
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, counted, field, write_tensors
from mi_jax.decomposition.formats.pursuit import PursuitUntilRepeat
from mi_jax.decomposition.formats.sae_lens_config import ARCHITECTURES, described, input_scale, settings
from mi_jax.decomposition.formats.tensors import Tensors
from mi_jax.decomposition.token_norm import TokenNorm
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

FILES = ("cfg.json", "sae_weights.safetensors")
_WHITENING = "activation_whitening.safetensors"
_HOLDS = Holds(
    ("ReLU", "Gated", "JumpReLU", "TopK", "AbsTopK", "BatchTopK", "MatchingPursuit", "PursuitUntilRepeat"),
    token_norms=("layer_norm", "unit_norm"),
    skip=True,
    widths=True,
)
_NORMS = {"unit_norm": "constant_norm_rescale", "layer_norm": "layer_norm"}


def _recognises(place: Place) -> bool:
    return place.has(*FILES)


def load(place: Place, options: Options) -> Dictionary:
    """Every architecture but `temporal`; norms that were meant to be folded are folded."""
    options.none_but("scale", format="sae_lens")
    where = place.join(FILES[0])
    config = settings(place.json(FILES[0]), where)
    tensors = place.tensors(FILES[1])
    architecture = config["architecture"]
    transcoder = "transcoder" in architecture
    tied = architecture == "matching_pursuit"
    w_dec = tensors.take("W_dec", None, None)
    d_sae, d_out = w_dec.shape
    w_enc = None if tied else np.ascontiguousarray(tensors.take("W_enc", None, d_sae).T)
    d_in = d_out if w_enc is None else w_enc.shape[1]
    if not transcoder and d_in != d_out:
        raise CheckpointError(f"{tensors.path}: W_enc reads width {d_in} and W_dec writes {d_out}; {where} says "
                              f"{architecture!r}, which reconstructs what it reads")  # fmt: skip
    norm = config["normalize_activations"]
    if transcoder and norm in _NORMS.values():
        raise CheckpointError(f"{where}: a transcoder with normalize_activations={norm!r} has outputs of unknown scale")
    centred = config["apply_b_dec_to_input"] and not transcoder
    b_dec = tensors.take("b_dec", d_out)
    biases = {"gated": "b_gate"}.get(architecture, "b_enc")
    model = dictionary(
        w_enc=w_enc,
        b_enc=np.zeros(d_sae) if tied else tensors.take(biases, d_sae),
        w_dec=_finetuned(w_dec, tensors),
        b_dec=b_dec if centred or not tied else np.zeros(d_out),
        activation=_activation(architecture, config, tensors, d_in, d_sae, where),
        w_skip=tensors.take("W_skip", d_out, d_in).T if "skip" in architecture else None,
        token_norm=_token_norm(norm),
        centred=centred,
    )
    if config["rescale_acts_by_decoder_norm"]:
        model = ranked_by_norm(model)
    if norm == "covariance_whitening":
        return _unwhitened(model, place)
    scale = input_scale(config, place, options)
    return model if scale == 1.0 else read_scaled(model, scale)


def _activation(
    architecture: str, config: Mapping[str, Any], tensors: Tensors, d_in: int, d_sae: int, where: str
) -> Activation:
    # BatchTopK's average may be a fraction
    k = counted(round(field(config, "k", float, where)), d_sae, where) if "topk" in architecture else 1
    match architecture:
        case "gated":
            return Gated(jnp.asarray(tensors.take("r_mag", d_sae)), jnp.asarray(tensors.take("b_mag", d_sae)))
        case "topk":
            return TopK(k)
        case "abstopk":
            return AbsTopK(k)
        case "batchtopk" | "matryoshka_batchtopk":
            return BatchTopK(jnp.asarray(tensors.number("topk_threshold"), jnp.float32), k)
        case "matching_pursuit":
            kind = PursuitUntilRepeat if config.get("stop_on_duplicate_support", True) else MatchingPursuit
            return kind(
                field(config, "max_iterations", int, where, default=d_in),
                field(config, "residual_threshold", float, where, default=1e-2),
            )
        case "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder":
            if "log_threshold" in tensors:
                return jumprelu(np.exp(tensors.take("log_threshold", d_sae, bounded=False)))
            return jumprelu(tensors.take("threshold", d_sae, bounded=False))
        case "standard" | "transcoder" | "skip_transcoder":
            return ReLU()
        case _:
            raise CheckpointError(
                f"{where}: architecture {architecture!r} is not known here; known are {', '.join(ARCHITECTURES)}"
            )


def _finetuned(w_dec: np.ndarray, tensors: Tensors) -> np.ndarray:
    """Codes that an old version multiplied after training; the decoder takes the factors."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            return w_dec * tensors.take(name, len(w_dec))[:, None]
    return w_dec


def _token_norm(name: str) -> TokenNorm | None:
    if name == "layer_norm":
        return TokenNorm("layer_norm", eps=1e-5, ddof=1)
    return TokenNorm("unit_norm", eps=0.0) if name == "constant_norm_rescale" else None


def _unwhitened(model: Dictionary, place: Place) -> Dictionary:
    """Of the dictionary of z = (x − mean) M, with x̂ = ẑ M⁻¹ + mean: the one of x."""
    if _WHITENING not in place.names:
        raise CheckpointError(f"{place.folder}: its activations are whitened, but there is no {_WHITENING}")
    if model.w_enc is None:
        raise CheckpointError(f"{place.folder}: whitening cannot be folded into a tied encoder")
    whitening = place.tensors(_WHITENING)
    d = model.d_in
    mean, matrix = jnp.asarray(whitening.take("mean", d)), jnp.asarray(whitening.take("matrix", d, d))
    inverse = jnp.asarray(whitening.take("inverse_matrix", d, d))
    # without b_dec at the input, the mean is all that is taken off there
    plain = centred_as(model, False)
    w_enc = plain.encoder @ matrix.T
    shift = w_enc @ mean
    b_mag = (lambda d: d.activation.b_mag) if isinstance(plain.activation, Gated) else None
    if b_mag is not None:
        plain = eqx.tree_at(b_mag, plain, b_mag(plain) - jnp.exp(plain.activation.r_mag) * shift)  # type: ignore[attr-defined]
    return eqx.tree_at(
        lambda d: (d.w_enc, d.b_enc, d.w_dec, d.b_dec),
        plain,
        (w_enc, plain.b_enc - shift, plain.w_dec @ inverse, plain.b_dec @ inverse + mean),
    )


def lacks(model: Model) -> str:
    """What of a dictionary has no place in it."""
    reason = _HOLDS.lacks(model)
    if reason or isinstance(model, CrossLayerTranscoder):
        return reason
    as_transcoder = model.w_skip is not None or model.d_in != model.d_out
    if as_transcoder and not isinstance(model.activation, ReLU | JumpReLU | BatchTopK):
        return f"a transcoder with the activation {type(model.activation).__name__}"
    if as_transcoder and model.token_norm is not None:
        return "a transcoder's token norm"
    if as_transcoder and model.centred and model.d_in != model.d_out:
        return "a transcoder that takes b_dec off its input"
    if isinstance(model.activation, MatchingPursuit) and (model.w_enc is not None or model.n_sites > 1):
        return "matching pursuit with an encoder of its own"
    if isinstance(model.activation, MatchingPursuit) and not model.centred and np.any(host(model.b_dec)):
        return "matching pursuit whose b_dec is added but not taken off"
    return "a crosscoder's sites" if model.n_sites > 1 else ""


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    """Version 6."""
    config, arrays = contents(model)
    config["metadata"] = {"sae_lens_version": "6.54.12"} | dict(metadata)
    write_tensors(os.path.join(folder, FILES[1]), arrays)
    write_json(os.path.join(folder, FILES[0]), config)


def contents(model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors. BatchTopK is written as the JumpReLU that it is outside training."""
    assert isinstance(model, Dictionary)
    transcoder = model.w_skip is not None or model.d_in != model.d_out
    if transcoder:
        model = centred_as(model, False)
    deviation = sample_deviation_scale(model.token_norm, model.d_in)
    if deviation != 1.0:
        model = read_scaled(model, deviation)
    activation = model.activation
    arrays = {"W_dec": host(model.w_dec), "b_dec": host(model.b_dec)}
    if not isinstance(activation, MatchingPursuit):
        arrays |= {"W_enc": host(model.encoder.T), "b_enc": host(model.b_enc)}
    if isinstance(activation, Gated):
        arrays |= {"b_gate": arrays.pop("b_enc"), "b_mag": host(activation.b_mag), "r_mag": host(activation.r_mag)}
    if isinstance(activation, JumpReLU | BatchTopK):
        arrays["threshold"] = thresholds(model)
    if model.w_skip is not None:
        arrays["W_skip"] = host(model.w_skip.T)
    norm = "none" if model.token_norm is None else _NORMS[model.token_norm.kind]
    return described(model, str(arrays["W_dec"].dtype), norm), arrays


FORMAT = Format(
    "SAELens 6",
    "cfg.json, sae_weights.safetensors",
    _recognises,
    load,
    lacks,
    _write,
)
