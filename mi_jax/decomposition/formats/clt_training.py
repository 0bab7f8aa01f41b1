"""clt-training (EleutherAI): cross-layer transcoders, a folder with `cfg.json` and `sae.safetensors` for each layer.

Layer i writes to n_targets layers from its own on: decoders `W_decs.j`, or one `W_dec` with a factor per latent and
target (`per_source_tied`), and a bias and a skip for each. What a layer is given is the sum over its sources.

Source: https://github.com/EleutherAI/clt-training.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mi_jax.decomposition.activations import TopK
from mi_jax.decomposition.cross_layer import CrossLayerTranscoder
from mi_jax.decomposition.formats.equivalent import Model, host
from mi_jax.decomposition.formats.format import Format
from mi_jax.decomposition.formats.holds import Holds
from mi_jax.decomposition.formats.options import Options
from mi_jax.decomposition.formats.place import Place, field, write_tensors
from mi_jax.decomposition.formats.sparsify import FILES, activation_of
from mi_jax.decomposition.formats.tensors import Tensors, safetensors
from mi_jax.models.checkpoints.directory import read_json
from mi_jax.models.checkpoints.errors import CheckpointError
from mi_jax.models.checkpoints.writer import write_json

_HOLDS = Holds(("TopK",), cross_layer=True, skip=True)


def _recognises(place: Place) -> bool:
    folders = _folders(place)
    return bool(folders) and "n_targets" in read_json(place.join(folders[0], FILES[0]))


def _folders(place: Place) -> list[str]:
    """The layers' folders, in the order of the numbers in their names."""
    if place.file is not None:
        return []
    names = (name for name in place.names if os.path.isfile(place.join(name, FILES[1])))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _load(place: Place, options: Options) -> CrossLayerTranscoder:
    """All layers. Targets beyond a layer's reach have a decoder of zeros."""
    options.none_but(format="clt_training")
    layers = [_Layer(place.join(name), len(_folders(place)) - i) for i, name in enumerate(_folders(place))]
    n, d_in, d_sae = len(layers), *layers[0].shape
    kinds = {layer.tied for layer in layers if layer.n_targets > 1}
    if len(kinds) > 1:
        raise CheckpointError(f"{place.folder}: decoders are tied in some layers and not in others")
    tied = kinds == {True}
    scale = tuple(jnp.asarray(layer.scale()) for layer in layers) if tied else None
    weights = [layer.tied_decoder() if tied else layer.decoders() for layer in layers]
    # a layer's target j is layer i + j
    biases = [sum(layers[i].bias(t - i) for i in range(t + 1) if t - i < layers[i].n_targets) for t in range(n)]
    skips = [layer.skip() for layer in layers]
    has_skip = any(skip is not None for skip in skips)
    return CrossLayerTranscoder(
        w_enc=jnp.asarray(np.stack([layer.tensors.take("encoder.weight", d_sae, d_in) for layer in layers])),
        b_enc=jnp.asarray(np.stack([layer.tensors.take("encoder.bias", d_sae) for layer in layers])),
        w_dec=tuple(jnp.asarray(w) for w in weights),
        b_dec=jnp.asarray(np.stack(biases)),
        activation=_one_activation(place, layers, d_sae),
        w_skip=jnp.asarray(np.stack([np.zeros((d_in, d_in)) if s is None else s for s in skips]), jnp.float32)
        if has_skip
        else None,
        scale=scale,
        tying="per_source" if tied else "none",
    )


def _one_activation(place: Place, layers: "list[_Layer]", d_sae: int) -> TopK:
    activations = {(type(a), a.k): a for a in (activation_of(layer.config, d_sae, layer.where) for layer in layers)}
    if len(activations) > 1:
        raise CheckpointError(f"{place.folder}: its layers have different activations or k, which is not known here")
    return next(iter(activations.values()))


class _Layer:
    """One layer's folder; `room` is how many layers there are from its own on."""

    def __init__(self, folder: str, room: int):
        self.where = os.path.join(folder, FILES[0])
        self.config: Mapping[str, Any] = read_json(self.where)
        self.tensors: Tensors = safetensors(os.path.join(folder, FILES[1]))
        self.room = room
        # no targets means its own layer only
        self.n_targets = max(1, field(self.config, "n_targets", int, self.where, default=0))
        self.tied = field(self.config, "per_source_tied", bool, self.where, default=False)
        self.shape = self.tensors.shape("encoder.weight", 2)[::-1]
        if self.n_targets > room:
            raise CheckpointError(
                f"{self.where}: n_targets is {self.n_targets}, but only {room} layers' folders follow"
            )
        if not self.config.get("transcode"):
            raise CheckpointError(f"{self.where}: transcode is not set, as it is in cross-layer transcoders")
        for name in ("normalize_io", "divide_cross_layer", "secondary_target_tied"):
            if self.config.get(name):
                raise CheckpointError(f"{self.where}: {name} is set, which is not known here")
        if self.config.get("coalesce_topk", "none") != "none":
            raise CheckpointError(f"{self.where}: coalesce_topk is set, which is not known here")
        for j in range(self.n_targets):
            name = self._of("post_encs", "post_enc", j)
            if name in self.tensors and self.tensors.take(name, self.shape[1]).any():
                raise CheckpointError(
                    f"{self.tensors.path}: {name!r} adds to codes that are not 0, which is not known here"
                )

    def _of(self, many: str, one: str, j: int) -> str:
        """The name of a parameter of target j; where there is one target only, it may be without a number."""
        numbered = f"{many}.{j}"
        return numbered if numbered in self.tensors or j > 0 else one

    def decoders(self) -> np.ndarray:
        """[d_sae target d_in], zeros for targets out of reach."""
        d_in, d_sae = self.shape
        out = np.zeros((d_sae, self.room, d_in), np.float32)
        for j in range(self.n_targets):
            out[:, j] = self.tensors.take(self._of("W_decs", "W_dec", j), d_sae, d_in) * self._factor(j)[:, None]
        return out

    def tied_decoder(self) -> np.ndarray:
        d_in, d_sae = self.shape
        return self.tensors.take(self._of("W_decs", "W_dec", 0), d_sae, d_in)[:, None]

    def scale(self) -> np.ndarray:
        """[d_sae target] of a tied decoder."""
        out = np.zeros((self.shape[1], self.room), np.float32)
        for j in range(self.n_targets):
            out[:, j] = self._factor(j)
        return out

    def _factor(self, j: int) -> np.ndarray:
        name = self._of("post_enc_scales", "post_enc_scale", j)
        if self.config.get("post_encoder_scale") and name in self.tensors:
            return self.tensors.take(name, self.shape[1])
        return np.ones(self.shape[1], np.float32)

    def bias(self, j: int) -> np.ndarray:
        return self.tensors.take(self._of("b_decs", "b_dec", j), self.shape[0])

    def skip(self) -> np.ndarray | None:
        """The linear path to its own layer; those to later layers must be absent."""
        if not self.config.get("skip_connection"):
            return None
        d_in = self.shape[0]
        for j in range(1, self.n_targets):
            if f"W_skips.{j}" in self.tensors and self.tensors.take(f"W_skips.{j}", d_in, d_in).any():
                raise CheckpointError(f"{self.tensors.path}: a skip to another layer, 'W_skips.{j}', is not known here")
        return self.tensors.take(self._of("W_skips", "W_skip", 0), d_in, d_in).T


def _lacks(model: Model) -> str:
    reason = _HOLDS.lacks(model)
    if reason or not isinstance(model, CrossLayerTranscoder):
        return reason
    if type(model.activation) is not TopK:
        return f"the activation {type(model.activation).__name__}"
    return "an output of another width than the input" if model.d_in != model.d_out else ""


def _write(folder: str, model: Model, metadata: Mapping[str, Any]) -> None:
    """Folders `layers.0`, `layers.1`, …; every layer writes to all from its own on."""
    assert isinstance(model, CrossLayerTranscoder)
    assert isinstance(model.activation, TopK)
    k = model.activation.k
    tied = model.tying == "per_source"
    model, n = model if tied else model.untied(), model.n_layers
    for i in range(n):
        config = {
            "activation": "topk",
            "expansion_factor": max(1, model.d_sae // model.d_in),
            "normalize_decoder": False,
            "num_latents": model.d_sae,
            "k": k,
            "skip_connection": model.w_skip is not None,
            "transcode": True,
            "n_targets": n - i,
            "n_sources": i + 1,
            "per_source_tied": tied,
            "post_encoder_scale": model.scale is not None,
            "d_in": model.d_in,
        }
        layer = os.path.join(folder, f"layers.{i}")
        os.mkdir(layer)
        write_tensors(os.path.join(layer, FILES[1]), _arrays(model, i, tied))
        write_json(os.path.join(layer, FILES[0]), config | dict(metadata))


def _arrays(model: CrossLayerTranscoder, i: int, tied: bool) -> dict[str, np.ndarray]:
    n_targets, d_in, d_sae = model.n_layers - i, model.d_in, model.d_sae
    dtype = np.dtype(model.w_enc.dtype)
    arrays = {"encoder.weight": host(model.w_enc[i]), "encoder.bias": host(model.b_enc[i])}
    if tied:
        arrays["W_dec"] = host(model.w_dec[i][:, 0])
    for j in range(n_targets):
        if not tied:
            arrays[f"W_decs.{j}"] = host(model.w_dec[i][:, j])
        # the sum over sources has the own layer's bias alone
        arrays[f"b_decs.{j}"] = host(model.b_dec[i]) if j == 0 else np.zeros(d_in, dtype)
        arrays[f"post_encs.{j}"] = np.zeros(d_sae, dtype)
        if model.scale is not None:
            arrays[f"post_enc_scales.{j}"] = host(model.scale[i][:, j])
        if model.w_skip is not None:
            arrays[f"W_skips.{j}"] = host(model.w_skip[i].T) if j == 0 else np.zeros((d_in, d_in), dtype)
    return arrays


FORMAT = Format(
    "clt-training (EleutherAI)",
    "a folder per layer with cfg.json, sae.safetensors",
    _recognises,
    _load,
    _lacks,
    _write,
)
